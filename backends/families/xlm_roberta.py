"""XLM-RoBERTa: RoBERTa over 250 000 multilingual tokens (BGE-M3, multilingual-e5, Arctic l-v2.0 ...)."""

from backends.families.base import Family, after_padding, refuse_other_positions

FAMILY = Family(
    name="xlm_roberta",
    model_types=("xlm-roberta", "xlm-roberta-xl"),
    position_offset=after_padding,
    load_arguments={"add_pooling_layer": False},
    native_config=refuse_other_positions,
)
