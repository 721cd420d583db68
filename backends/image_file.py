"""Encoded image files -> pixels: one picture in red, green and blue, the right way up.

Of an animation the first picture counts. What is transparent lies on white, as in transformers; numbers of 16
bits lose their lower half. Files that break off, that are no images, or that would take too much memory are
refused with a reason.

*Source:* transformers 5.23, image_transforms.convert_to_rgb, for transparency; its image_utils.load_image for
turning a picture as its EXIF data says.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from backends.contract import ErrorCode
from backends.errors import RequestError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What is read. Pillow knows more, among them formats that start other programs."""
MAX_PIXELS = 50_000_000
"""Of one picture; a camera's largest has 48 million. In memory a pixel takes 3 bytes, and 4 more where it is
transparent.
"""
_SIXTEEN_BITS = 65535
_WHITE = (255, 255, 255, 255)


def read_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A file's picture, in the mode RGB. Raises RequestError (without the item's place)."""
    # Pillow's own limit is a warning first, and higher.
    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise _refusal(
                    f"it has {width} x {height} pixels; at most {max_pixels} are taken, send it smaller"
                )
            picture.load()
            return _to_rgb(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError:
        raise _refusal(
            f"its {len(data)} bytes are no image that is read here ({', '.join(FORMATS)})"
        ) from None
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # the readers of broken files trip over anything
        raise _refusal(f"it cannot be read: {error or type(error).__name__}") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        return _from_integers(picture)
    if picture.mode == "F":
        raise _refusal("its pixels are fractions whose range is not told; send it as a PNG or JPEG file")
    has_alpha = "A" in picture.getbands() or picture.info.get("transparency") is not None
    if has_alpha or picture.mode in ("La", "RGBa"):
        own = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", own.size, _WHITE), own).convert("RGB")
    return picture.convert("RGB")


def _from_integers(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits: Pillow's own conversion would make white of nearly everything."""
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > _SIXTEEN_BITS:
        raise _refusal("its pixels have more than 16 bits; send it as a PNG or JPEG file")
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


def _refusal(reason: str) -> RequestError:
    return RequestError(ErrorCode.INVALID_IMAGE, f"the image cannot be used: {reason}")
