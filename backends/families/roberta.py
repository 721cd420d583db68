"""RoBERTa and CamemBERT: positions begin behind the padding id, no token types (all-roberta, French
E5 ...).
"""

from backends.families.base import Family, after_padding

FAMILY = Family(
    name="roberta",
    model_types=("roberta", "camembert"),
    position_offset=after_padding,
    load_arguments={"add_pooling_layer": False},
)
