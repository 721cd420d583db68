"""Qwen2.5-VL: as Qwen2-VL, with another model of images.

*Source:* transformers 5.23, Qwen2_5_VLModel.
"""

from __future__ import annotations

from backends.families.base import Family
from backends.qwen_vision import GME_VISION

FAMILY = Family(
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    is_decoder=True,
    vision=GME_VISION,
)
