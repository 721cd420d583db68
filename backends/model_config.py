"""Reading config.json of models that have several parts: a model of texts and images has a configuration in
it for each, or, as older ones were published, that of the language model lies open and only the other is
nested.

*Source:* transformers 5.23, CLIPConfig and Qwen2VLConfig, for the names and for what a file may leave out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What the published files leave to transformers' classes.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {"projection_dim": 512, "max_position_embeddings": 77, "vocab_size": 49408},
}
_CLIP_VISION = {"image_size": 224, "patch_size": 32}
_QWEN_VISION = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}


def language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the entries of the language model's own part over it."""
    nested = {**(config.get("text_config") or {}), **(config.get("text_config_dict") or {})}
    return {**_DEFAULTS.get(str(config.get("model_type")), {}), **config, **nested}


def vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of config.json that is about images."""
    defaults = _CLIP_VISION if config.get("model_type") == "clip" else _QWEN_VISION
    return {
        **defaults,
        **(config.get("vision_config") or {}),
        **(config.get("vision_config_dict") or {}),
    }


def hidden_size(config: Mapping[str, Any]) -> Any:
    """Components of what the encoder gives; DistilBERT calls it dim, Nomic BERT n_embd. Of CLIP it is what
    both of its models are projected to.
    """
    if config.get("model_type") == "clip":
        return {**_DEFAULTS["clip"], **config}["projection_dim"]
    language = language_config(config)
    return next((language[name] for name in ("hidden_size", "dim", "n_embd") if name in language), None)


def positions(config: Mapping[str, Any]) -> int | None:
    """Positions that the model has, those of padding included; None where it does not tell."""
    language = language_config(config)
    declared = int(language.get("max_position_embeddings") or language.get("n_positions") or 0)
    return declared if declared > 0 else None
