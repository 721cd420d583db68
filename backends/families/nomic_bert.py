"""Nomic BERT: rotary positions and a gated feed-forward (nomic-embed-text v1 and v1.5)."""

from collections.abc import Mapping
from typing import Any

from backends.errors import CheckpointError
from backends.families.base import Family

# Their config.json has the names of a GPT-2 configuration.
_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
}
_KEPT = ("vocab_size", "type_vocab_size", "pad_token_id", "initializer_range")
# What the native class does not know, and the only values with which that makes no difference.
_ASSUMED = {
    "activation_function": ("swiglu",),
    "prenorm": (False,),
    "qkv_proj_bias": (False,),
    "mlp_fc1_bias": (False,),
    "mlp_fc2_bias": (False,),
    "rotary_emb_fraction": (1.0, 1),
    "rotary_emb_interleaved": (False,),
    "rotary_scaling_factor": (None,),
    "num_experts": (None, 0, 1),
}


def _native_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    if "n_embd" not in config:
        return None
    for name, values in _ASSUMED.items():
        if name in config and config[name] not in values:
            raise CheckpointError(
                f"config.json says {name} {config[name]!r}, which is not served; it takes {values[0]!r}"
            )
    native = {new: config[old] for old, new in _NAMES.items() if config.get(old) is not None}
    native.update({name: config[name] for name in _KEPT if name in config})
    theta = float(config.get("rotary_emb_base", 1000))
    return {**native, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


FAMILY = Family(
    name="nomic_bert",
    model_types=("nomic_bert",),
    has_token_types=True,
    load_arguments={"add_pooling_layer": False},
    native_config=_native_config,
)
