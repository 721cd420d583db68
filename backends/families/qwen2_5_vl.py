"""Qwen2.5-VL: as Qwen2-VL, with another model of images.

*Source:* transformers 5.23, Qwen2_5_VLModel.
"""

from __future__ import annotations

from backends.chat_prompt import GME
from backends.families.base import Family, Vision
from backends.qwen_vision import gme_processor, image_tokens, is_gme, wrap

FAMILY = Family(
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    is_decoder=True,
    vision=Vision(
        processor=gme_processor,
        tokens=image_tokens,
        wrap=wrap,
        chat_prompt=GME,
        has_axes=True,
        is_told=is_gme,
    ),
)
