"""EuroBERT: a bidirectional encoder built like Llama."""

from backends.families.base import Family

FAMILY = Family(name="eurobert", model_types=("eurobert",))
