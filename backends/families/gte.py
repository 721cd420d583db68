"""GTE v1.5 and gte-multilingual ("NewModel"), and Arctic m-v2.0: rotary positions, a gated feed-forward.

*Source:* transformers 5.23 models/gte, which loads the tensors of the original repositories. Their
config.json has another model_type and another way to stretch positions (NTK): theta is multiplied by the
factor, and every frequency divided by factor^(2/d), as text-embeddings-inference and vLLM do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backends.errors import CheckpointError
from backends.families.base import Family

if TYPE_CHECKING:
    import torch

_KEPT = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "pad_token_id",
)
# What the native class does not know, and the only values with which that makes no difference.
_ASSUMED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "layer_norm_type": ("layer_norm",),
    "logn_attention_scale": (False,),
}


def _native_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    if config.get("model_type") != "new":
        return None
    for name, values in _ASSUMED.items():
        if name in config and config[name] not in values:
            raise CheckpointError(
                f"config.json says {name} {config[name]!r}, which is not served; it takes {values[0]!r}"
            )
    scaling = config.get("rope_scaling") or {}
    if scaling.get("type", "ntk") != "ntk" or scaling.get("mixed_b") is not None:
        raise CheckpointError(
            f"config.json says rope_scaling {scaling}, which is not served; its type may be 'ntk'"
        )
    theta = float(config.get("rope_theta", 10000.0))
    native = {name: config[name] for name in _KEPT if name in config}
    return {**native, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def _stretch_positions(model: torch.nn.Module, config: Mapping[str, Any]) -> None:
    """Puts the NTK frequencies of an original config.json into the loaded model."""
    scaling = config.get("rope_scaling") if config.get("model_type") == "new" else None
    if not scaling:
        return
    import torch

    rotary: Any = model.rotary_emb
    size = 2 * rotary.inv_freq.shape[0]
    factor = float(scaling["factor"])
    base = float(config.get("rope_theta", 10000.0)) * factor
    powers = torch.arange(0, size, 2, dtype=torch.float32) / size
    frequencies = 1.0 / (base**powers) / factor ** (2 / size)
    rotary.inv_freq.copy_(frequencies)
    rotary.original_inv_freq.copy_(frequencies)


FAMILY = Family(
    name="gte",
    model_types=("gte", "new"),
    has_token_types=True,
    load_arguments={"add_pooling_layer": False},
    native_config=_native_config,
    adjust=_stretch_positions,
)
