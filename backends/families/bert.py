"""BERT: learned positions from 0, token types, bidirectional attention (MiniLM, BGE v1.5, E5 v2, GTE,
Arctic ...).
"""

from backends.families.base import Family, refuse_other_positions

FAMILY = Family(
    name="bert",
    model_types=("bert",),
    has_token_types=True,
    load_arguments={"add_pooling_layer": False},
    native_config=refuse_other_positions,
)
