"""ModernBERT: rotary positions, attention within a window in two layers of three (gte-modernbert,
nomic ...).
"""

from backends.families.base import Family

FAMILY = Family(name="modernbert", model_types=("modernbert",))
