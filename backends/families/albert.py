"""ALBERT: BERT with one layer's weights for all layers."""

from backends.families.base import Family

FAMILY = Family(
    name="albert",
    model_types=("albert",),
    has_token_types=True,
    load_arguments={"add_pooling_layer": False},
)
