"""CLIP: a causal model of texts and one of images, projected into one space; an item is a text or an image.

*Source:* transformers 5.23, CLIPModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backends.families.base import Family, ImageTokens, Vision
from backends.image_processing import ClipProcessor, processor_config, value_table

if TYPE_CHECKING:
    import torch

    from backends.checkpoint import Checkpoint

# No id of any vocabulary: an image has no words.
_IMAGE = -1


def _tokens(config: Mapping[str, Any]) -> ImageTokens:
    return ImageTokens(_IMAGE, is_item=True)


def _wrap(model: Any, checkpoint: Checkpoint) -> torch.nn.Module:
    from backends.two_towers import TwoTowers

    return TwoTowers(model, value_table(processor_config(checkpoint)))


FAMILY = Family(
    name="clip",
    model_types=("clip",),
    vision=Vision(
        processor=lambda checkpoint, options: ClipProcessor(checkpoint),
        tokens=_tokens,
        wrap=_wrap,
    ),
)
