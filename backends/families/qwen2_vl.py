"""Qwen2-VL: a causal language model among whose words are patches of images, as GME-Qwen2-VL uses it.

*Source:* transformers 5.23, Qwen2VLModel; Alibaba-NLP/gme-Qwen2-VL-2B-Instruct for the prompt and the bounds
of images.
"""

from __future__ import annotations

from backends.families.base import Family
from backends.qwen_vision import GME_VISION

FAMILY = Family(
    name="qwen2_vl",
    model_types=("qwen2_vl",),
    other_names=("gme",),
    is_decoder=True,
    vision=GME_VISION,
)
