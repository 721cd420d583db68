"""What Qwen's models of texts and images share: the ids around an image, and how it is made ready."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backends import chat_prompt
from backends.families.base import ImageTokens, Vision
from backends.image_processing import (
    GME_IMAGE_TOKENS,
    ImageProcessor,
    ImageSteps,
    QwenProcessor,
    processor_config,
    value_table,
)
from backends.model_config import vision_config

if TYPE_CHECKING:
    import torch

    from backends.checkpoint import Checkpoint
    from backends.options import ServingOptions

# *Source:* transformers' defaults for Qwen2VLConfig, where a file does not name them.
_START, _END, _IMAGE, _VIDEO = 151652, 151653, 151655, 151656
# *Source:* Qwen/Qwen3-VL-Embedding-2B, scripts/qwen3_vl_embedding.py: tokens of one image, each of 32 x 32
# pixels.
_QWEN3_IMAGE_TOKENS = (4, 1800)


_GME_NAME = re.compile(r"gme_?qwen2_?vl|gme_inference", re.IGNORECASE)


def is_gme(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint says that it is GME: by its classes, or by the code that it brings (which is not
    run).
    """
    auto_map = checkpoint.config.get("auto_map") or {}
    code = (file.name for file in checkpoint.path.glob("*.py"))
    return any(map(_GME_NAME.search, (checkpoint.architecture, *map(str, auto_map.values()), *code)))


def image_tokens(config: Mapping[str, Any]) -> ImageTokens:
    """An image between its two marks."""
    vision = vision_config(config)
    image, video = int(config.get("image_token_id", _IMAGE)), int(config.get("video_token_id", _VIDEO))
    return ImageTokens(
        image,
        (int(config.get("vision_start_token_id", _START)),),
        (int(config.get("vision_end_token_id", _END)),),
        merge=int(vision["spatial_merge_size"]),
        reserved=(image, video),
    )


def gme_processor(checkpoint: Checkpoint, options: ServingOptions) -> ImageProcessor:
    """GME's bounds and its first resize for GME, else what the checkpoint's own file says."""
    taken_for_gme = is_gme(checkpoint) or options.chat_template == chat_prompt.GME
    least, most = options.min_image_tokens, options.max_image_tokens
    if taken_for_gme:
        own = checkpoint.config
        least = least or int(own.get("min_image_tokens") or GME_IMAGE_TOKENS[0])
        most = most or int(own.get("max_image_tokens") or GME_IMAGE_TOKENS[1])
    return QwenProcessor(checkpoint, ImageSteps.GME if taken_for_gme else ImageSteps.PROCESSOR, least, most)


def qwen3_processor(checkpoint: Checkpoint, options: ServingOptions) -> ImageProcessor:
    """The steps and the bounds of Qwen3-VL-Embedding's own code."""
    least = options.min_image_tokens or _QWEN3_IMAGE_TOKENS[0]
    most = options.max_image_tokens or _QWEN3_IMAGE_TOKENS[1]
    return QwenProcessor(checkpoint, ImageSteps.QWEN3, least, most)


def wrap(model: Any, checkpoint: Checkpoint) -> torch.nn.Module:
    """transformers' model as packed rows need it."""
    from backends.vision_language import VisionLanguage

    frames = int(vision_config(checkpoint.config)["temporal_patch_size"])
    return VisionLanguage(model, value_table(processor_config(checkpoint)), frames)


GME_VISION = Vision(
    processor=gme_processor,
    tokens=image_tokens,
    wrap=wrap,
    chat_prompt=chat_prompt.GME,
    has_axes=True,
    is_told=is_gme,
)
"""What Qwen2-VL and Qwen2.5-VL have in common; only some checkpoints of them are GME."""
