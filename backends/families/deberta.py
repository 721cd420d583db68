"""DeBERTa, all versions: attention over content and relative position, which takes no attention function, so
it runs padded.
"""

from backends.families.base import Family

FAMILY = Family(name="deberta", model_types=("deberta", "deberta-v2"))
