"""ELECTRA: BERT with smaller embeddings that are projected to the hidden size."""

from backends.families.base import Family

FAMILY = Family(name="electra", model_types=("electra",), has_token_types=True)
