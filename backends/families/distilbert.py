"""DistilBERT: BERT with half the layers and no token types (SPLADE's distilled models,
msmarco-distilbert ...).
"""

from backends.families.base import Family

FAMILY = Family(name="distilbert", model_types=("distilbert",))
