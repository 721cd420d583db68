"""Pixels of one picture -> the patches that a model looks at, with Pillow and numpy.

A processor resizes and cuts; the numbers stay bytes on their way to the encoder, which looks up in a table
what rescaling and normalising makes of each. That is the same arithmetic on the same 256 values, so the
result is that of transformers' processors bit by bit, at an eighth of the traffic.

*Source:* transformers 5.23, CLIPImageProcessorPil and Qwen2VLImageProcessorPil; gme_inference.py of
Alibaba-NLP/gme-Qwen2-VL-2B-Instruct and scripts/qwen3_vl_embedding.py of Qwen/Qwen3-VL-Embedding-2B for what
these do besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from backends.checkpoint import Checkpoint
from backends.contract import ErrorCode
from backends.errors import CheckpointError, OptionError, RequestError
from backends.json_file import read_json
from backends.model_config import vision_config

Patches = npt.NDArray[np.uint8]
"""[p, c]: red, green and blue of a square, a row of pixels after the other."""
Grid = tuple[int, int, int]
"""Patches along time, height and width."""

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3
# A picture of extreme proportions would grow to gigabytes before it is cut.
_MOST_RESIZED_PIXELS = 2**24
_MOST_ASPECT_RATIO = 200
GME_IMAGE_TOKENS = (256, 1280)
"""What GME's own code takes for one picture, whatever the checkpoint's processor says."""


class ImageSteps(StrEnum):
    """Whose steps a picture of Qwen's models goes through."""

    PROCESSOR = "processor"
    """Those of transformers' processor."""
    GME = "gme"
    """Those of GME's own code: qwen-vl-utils' resize within wide bounds, then the processor."""
    QWEN3 = "qwen3"
    """Those of Qwen3-VL-Embedding's own code: qwen-vl-utils' resize only."""


class ImageProcessor(Protocol):
    """The processor of one checkpoint."""

    patch_size: int
    """Pixels of a patch's side."""
    min_image_tokens: int
    max_image_tokens: int
    """Tokens that one picture takes at least, and at most."""

    def __call__(self, picture: Image.Image) -> tuple[Patches, Grid]:
        """A picture in RGB -> its patches. Raises RequestError for one that cannot be used."""


def processor_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """preprocessor_config.json, or the same inside processor_config.json. Raises CheckpointError."""
    own = read_json(checkpoint.transformer_path / "preprocessor_config.json")
    own = own or read_json(checkpoint.transformer_path / "processor_config.json").get("image_processor") or {}
    if not own:
        raise CheckpointError(
            f"{checkpoint.transformer_path} has no preprocessor_config.json, which tells how its images are "
            "made ready"
        )
    return own


def value_table(config: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """[3, 256] float32, by the steps and in the number formats of transformers' rescale and normalize."""
    values = np.arange(256, dtype=np.float64)
    if config.get("do_rescale", True):
        values = values * float(config.get("rescale_factor") or 1 / 255)
    rows = np.broadcast_to(values.astype(np.float32), (3, 256))
    if config.get("do_normalize", True):
        mean = np.array(config.get("image_mean") or _CLIP_MEAN, np.float32)
        std = np.array(config.get("image_std") or _CLIP_STD, np.float32)
        rows = (rows - mean[:, None]) / std[:, None]
    return np.ascontiguousarray(rows, np.float32)


class ClipProcessor:
    """The shorter side to a size, then the middle: every picture has as many patches as any other."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError for a processor whose pictures do not fit the model."""
        config = processor_config(checkpoint)
        vision = vision_config(checkpoint.config)
        self.patch_size = int(vision["patch_size"])
        self.image_size = int(vision["image_size"])
        self.resample = int(config.get("resample", _BICUBIC))
        self.resizes = bool(config.get("do_resize", True))
        self.size = _size(config.get("size", 224))
        self.crop = _sides(config.get("crop_size", 224)) if config.get("do_center_crop", True) else None
        made = self.crop or (self.size if isinstance(self.size, tuple) and self.resizes else None)
        if made != (self.image_size, self.image_size):
            raise CheckpointError(
                f"{checkpoint.transformer_path}/preprocessor_config.json makes images of {made}, and the "
                f"model takes {self.image_size} x {self.image_size}"
            )
        self.grid = (1, self.image_size // self.patch_size, self.image_size // self.patch_size)
        self.min_image_tokens = self.max_image_tokens = self.grid[1] * self.grid[2] + 1

    def __call__(self, picture: Image.Image) -> tuple[Patches, Grid]:
        picture = self._resized(picture) if self.resizes else picture
        pixels = _middle(np.asarray(picture), self.crop) if self.crop else np.asarray(picture)
        _, rows, columns = self.grid
        size = self.patch_size
        pixels = pixels[: rows * size, : columns * size]
        patches = pixels.reshape(rows, size, columns, size, 3).transpose(0, 2, 4, 1, 3)
        return np.ascontiguousarray(patches).reshape(rows * columns, -1), self.grid

    def _resized(self, picture: Image.Image) -> Image.Image:
        if isinstance(self.size, tuple):
            height, width = self.size
            return picture.resize((width, height), self.resample)
        short, long = sorted(picture.size)
        other = int(self.size * long / short)
        width, height = (self.size, other) if picture.width <= picture.height else (other, self.size)
        if width * height <= _MOST_RESIZED_PIXELS or self.crop is None:
            return picture.resize((width, height), self.resample)
        # Only what the crop leaves of it; the filter's weights may differ from the whole's in their last bit.
        left, top, new_width, new_height = _crop_box(width, height, self.crop)
        scale_x, scale_y = picture.width / width, picture.height / height
        box = (left * scale_x, top * scale_y, (left + new_width) * scale_x, (top + new_height) * scale_y)
        return picture.resize((new_width, new_height), self.resample, box)


@dataclass(frozen=True)
class PixelBounds:
    """How many pixels a resized picture may have."""

    least: int
    most: int


_GME_FETCHED = PixelBounds(4 * 28 * 28, 16384 * 28 * 28)
Sizing = Callable[[int, int], tuple[int, int]]
"""(width, height) of a picture -> those that it is resized to."""


class QwenProcessor:
    """Any proportions: both sides to multiples of a patch group, within bounds of pixels."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        steps: ImageSteps = ImageSteps.PROCESSOR,
        least: int | None = None,
        most: int | None = None,
    ) -> None:
        """`steps` says whose resizing is followed; `least` and `most` are tokens of one picture, and stand
        in for the limits of the checkpoint's own file.

        Raises CheckpointError where that file is missing or does not resize, and OptionError where
        the two limits leave no size.
        """
        config = processor_config(checkpoint)
        size = config.get("size") or {}
        self.patch_size = int(config.get("patch_size", 14))
        self.merge_size = int(config.get("merge_size", 2))
        self.resample = int(config.get("resample", _BICUBIC))
        unit = self.patch_size * self.merge_size
        own_least = config.get("min_pixels") or size.get("shortest_edge") or 56 * 56
        own_most = config.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
        bounds = PixelBounds(
            int(own_least) if least is None else least * unit**2,
            int(own_most) if most is None else most * unit**2,
        )
        self.min_image_tokens = -(-bounds.least // unit**2)
        self.max_image_tokens = max(1, bounds.most // unit**2)
        if bounds.least > bounds.most:
            raise OptionError(
                f"an image would have at least {self.min_image_tokens} and at most {self.max_image_tokens} "
                "tokens; give --min-image-tokens and --max-image-tokens that fit together"
            )
        if not config.get("do_resize", True):
            raise CheckpointError(
                f"{checkpoint.transformer_path}/preprocessor_config.json does not resize, which is not served"
            )
        fit = partial(fitted_size, unit=unit, bounds=bounds)
        self.sizings: tuple[Sizing, ...] = {
            ImageSteps.PROCESSOR: (fit,),
            ImageSteps.GME: (gme_fetched_size, fit),
            ImageSteps.QWEN3: (partial(fetched_size, unit=unit, bounds=bounds),),
        }[steps]

    def __call__(self, picture: Image.Image) -> tuple[Patches, Grid]:
        for sizing in self.sizings:
            picture = picture.resize(sizing(*picture.size), self.resample)
        return self._patches(np.asarray(picture))

    def _patches(self, pixels: npt.NDArray[np.uint8]) -> tuple[Patches, Grid]:
        size, merge = self.patch_size, self.merge_size
        rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
        # Patches that become one token lie side by side.
        parts = pixels.reshape(rows // merge, merge, size, columns // merge, merge, size, 3)
        patches = np.ascontiguousarray(parts.transpose(0, 3, 1, 4, 6, 2, 5))
        return patches.reshape(rows * columns, -1), (1, rows, columns)


def fitted_size(width: int, height: int, unit: int, bounds: PixelBounds) -> tuple[int, int]:
    """(width, height) in multiples of `unit`. Raises RequestError. *Source:* transformers' smart_resize."""
    _check_ratio(width, height)
    return _within(width, height, unit, bounds, 0)


def fetched_size(width: int, height: int, unit: int, bounds: PixelBounds) -> tuple[int, int]:
    """The same, but for sides of less than half a unit. *Source:* smart_resize of qwen-vl-utils."""
    _check_ratio(width, height)
    return _within(width, height, unit, bounds, unit)


def gme_fetched_size(width: int, height: int) -> tuple[int, int]:
    """GME's first resize, which makes every picture one that the second takes. *Source:* gme_inference.py."""
    sides = _within(width, height, 28, _GME_FETCHED, 28)
    short = min(sides)
    return min(sides[0], short * _MOST_ASPECT_RATIO), min(sides[1], short * _MOST_ASPECT_RATIO)


def _within(width: int, height: int, unit: int, bounds: PixelBounds, shortest: int) -> tuple[int, int]:
    sides = [max(shortest, round(side / unit) * unit) for side in (width, height)]
    if sides[0] * sides[1] > bounds.most:
        beta = math.sqrt((width * height) / bounds.most)
        sides = [max(unit, math.floor(side / beta / unit) * unit) for side in (width, height)]
    elif sides[0] * sides[1] < bounds.least:
        beta = math.sqrt(bounds.least / (width * height))
        sides = [math.ceil(side * beta / unit) * unit for side in (width, height)]
    return sides[0], sides[1]


def _check_ratio(width: int, height: int) -> None:
    if max(width, height) / min(width, height) > _MOST_ASPECT_RATIO:
        raise RequestError(
            ErrorCode.INVALID_IMAGE,
            f"the image has {width} x {height} pixels; one side may be {_MOST_ASPECT_RATIO} times as long "
            "as the other at most",
        )


def _size(declared: Any) -> int | tuple[int, int]:
    """The length of the shorter side, or (height, width)."""
    if isinstance(declared, Mapping) and "shortest_edge" in declared:
        return int(declared["shortest_edge"])
    return _sides(declared) if isinstance(declared, Mapping) else int(declared)


def _sides(declared: Any) -> tuple[int, int]:
    """(height, width)."""
    if isinstance(declared, Mapping):
        return int(declared["height"]), int(declared["width"])
    return int(declared), int(declared)


def _crop_box(width: int, height: int, crop: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, width, height) of the middle, as far as there is one."""
    new_height, new_width = min(crop[0], height), min(crop[1], width)
    return (width - new_width) // 2, (height - new_height) // 2, new_width, new_height


def _middle(pixels: npt.NDArray[np.uint8], crop: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """[h, w, 3] of the crop's size; black around what is smaller. *Source:* transformers' center_crop."""
    left, top, width, height = _crop_box(pixels.shape[1], pixels.shape[0], crop)
    kept = pixels[top : top + height, left : left + width]
    if kept.shape[:2] == crop:
        return kept
    room = np.zeros((*crop, 3), np.uint8)
    above, before = (math.ceil((most - own) / 2) for most, own in zip(crop, kept.shape[:2], strict=True))
    room[above : above + height, before : before + width] = kept
    return room
