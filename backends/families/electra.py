"""ELECTRA: BERT with smaller embeddings that are projected to the hidden size."""

from backends.families.base import Family, refuse_other_positions

FAMILY = Family(
    name="electra",
    model_types=("electra",),
    has_token_types=True,
    native_config=refuse_other_positions,
)
