"""Qwen2-VL: a causal language model among whose words are patches of images, as GME-Qwen2-VL uses it.

*Source:* transformers 5.23, Qwen2VLModel; Alibaba-NLP/gme-Qwen2-VL-2B-Instruct for the prompt and the bounds
of images.
"""

from __future__ import annotations

from backends.chat_prompt import GME
from backends.families.base import Family, Vision
from backends.qwen_vision import gme_processor, image_tokens, is_gme, wrap

FAMILY = Family(
    name="qwen2_vl",
    model_types=("qwen2_vl",),
    other_names=("gme",),
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
