"""Qwen3-VL: as Qwen2-VL, with states of images added behind several layers (Qwen3-VL-Embedding).

*Source:* transformers 5.23, Qwen3VLModel; Qwen/Qwen3-VL-Embedding-2B for the prompt and the bounds of images.
"""

from __future__ import annotations

from backends.chat_prompt import QWEN3_VL
from backends.families.base import Family, Vision
from backends.qwen_vision import image_tokens, qwen3_processor, wrap

FAMILY = Family(
    name="qwen3_vl",
    model_types=("qwen3_vl",),
    is_decoder=True,
    vision=Vision(
        processor=qwen3_processor,
        tokens=image_tokens,
        wrap=wrap,
        chat_prompt=QWEN3_VL,
        has_axes=True,
        is_told=lambda checkpoint: checkpoint.has_modules,
    ),
)
