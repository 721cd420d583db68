"""Qwen2: causal, but for gte-Qwen2, whose config.json does not say so.

gte-Qwen2 brings code of its own, which looks both ways and puts <|endoftext|> behind every text. The name of
that code in auto_map is what tells it from others; the code itself is not run.

*Source:* text-embeddings-inference 1.9 recognises it the same way; RTP-LLM 4b8d39cd5 has a model type of its
own for it, qwen_2_embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.families.base import INSTRUCT, Causality, Family

_BIDIRECTIONAL_NAME = "qwen_2_embedding"
# The only size of gte-Qwen2 of which the sources say different things.
_DISPUTED_HIDDEN_SIZE = 1536


def is_gte(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of gte-Qwen2."""
    auto_map = config.get("auto_map") or {}
    return str(auto_map.get("AutoModel", "")).endswith("modeling_qwen.Qwen2Model")


def _own_causality(config: Mapping[str, Any]) -> Causality | None:
    if not is_gte(config):
        return None
    reason = "config.json names gte-Qwen2's code, modeling_qwen.Qwen2Model"
    if config.get("hidden_size") == _DISPUTED_HIDDEN_SIZE:
        reason += "; for the 1.5B model vLLM's tests have it causal, which --causal gives"
    return Causality(False, reason)


FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    other_names=("qwen_2", _BIDIRECTIONAL_NAME),
    bidirectional_names=(_BIDIRECTIONAL_NAME,),
    is_decoder=True,
    own_causality=_own_causality,
    instruction=INSTRUCT,
    last_token=lambda config: "<|endoftext|>" if is_gte(config) else None,
)
