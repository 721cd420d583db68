"""RoBERTa and CamemBERT: positions begin behind the padding id, no token types (all-roberta, French
E5 ...).
"""

from backends.families.base import Family, after_padding, refuse_other_positions

FAMILY = Family(
    name="roberta",
    model_types=("roberta", "camembert"),
    position_offset=after_padding,
    load_arguments={"add_pooling_layer": False},
    native_config=refuse_other_positions,
)
