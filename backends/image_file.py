"""Encoded image files -> pixels: one picture in red, green and blue, the right way up.

Of an animation the first picture counts. What is transparent lies on white, as in transformers; numbers of 16
bits lose their lower half. Files that break off, that are no images, or that would take too much memory are
refused with a reason.

*Source:* transformers 5.23, image_transforms.convert_to_rgb, for transparency; its image_utils.load_image for
turning a picture as its EXIF data says.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from backends.contract import ErrorCode
from backends.errors import RequestError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What is read. Pillow knows more, among them formats that start other programs."""
MAX_PIXELS = 50_000_000
"""Of one picture; a camera's largest has 48 million. In memory a pixel takes 4 bytes, and as many again
where it is transparent or turned.
"""
_EIGHT_BITS, _SIXTEEN_BITS = 255, 65535
_WHITE = (255, 255, 255, 255)
# Rows that are laid on white at a time have about so many pixels.
_STRIP_PIXELS = 2**20


class PixelBudget:
    """How many pixels all threads together may have in memory; a larger picture is alone."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._used = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Waits for its turn."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + pixels <= self._most)
            self._used += pixels
        try:
            yield
        finally:
            with self._changed:
                self._used -= pixels
                self._changed.notify_all()


@contextlib.contextmanager
def read_image(
    data: bytes, max_pixels: int = MAX_PIXELS, budget: PixelBudget | None = None
) -> Iterator[Image.Image]:
    """A file's picture, in the mode RGB, for as long as the budget counts its pixels.

    Raises RequestError (without the item's place).
    """
    # Pillow's own limit is a warning first, and higher.
    Image.MAX_IMAGE_PIXELS = None
    with contextlib.ExitStack() as stack:
        with _explaining(data):
            picture: Image.Image = stack.enter_context(Image.open(io.BytesIO(data), formats=FORMATS))
            width, height = picture.size
            if width * height > max_pixels:
                raise _refusal(
                    f"it has {width} x {height} pixels; at most {max_pixels} are taken, send it smaller"
                )
        if budget is not None:
            stack.enter_context(budget.take(width * height))
        with _explaining(data):
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            picture = _to_rgb(picture)
        yield picture


@contextlib.contextmanager
def _explaining(data: bytes) -> Iterator[None]:
    """Whatever a reader trips over is a refusal with its reason."""
    try:
        yield
    except UnidentifiedImageError:
        raise _refusal(
            f"its {len(data)} bytes are no image that is read here ({', '.join(FORMATS)})"
        ) from None
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # the readers of broken files trip over anything
        raise _refusal(f"it cannot be read: {error or type(error).__name__}") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB" and picture.info.get("transparency") is None:
        return picture
    if picture.mode.startswith("I"):
        return _from_integers(picture)
    if picture.mode == "F":
        raise _refusal("its pixels are fractions whose range is not told; send it as a PNG or JPEG file")
    has_alpha = "A" in picture.getbands() or picture.info.get("transparency") is not None
    if has_alpha or picture.mode in ("La", "RGBa"):
        return _on_white(picture)
    return picture.convert("RGB")


def _on_white(picture: Image.Image) -> Image.Image:
    """Strip by strip, so that no second and third whole picture is in memory."""
    made = Image.new("RGB", picture.size)
    step = max(1, _STRIP_PIXELS // picture.width)
    for top in range(0, picture.height, step):
        strip = picture.crop((0, top, picture.width, min(top + step, picture.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, _WHITE)
        made.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return made


def _from_integers(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits: Pillow's own conversion would make white of nearly everything."""
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > _SIXTEEN_BITS:
        raise _refusal("its pixels have more than 16 bits; send it as a PNG or JPEG file")
    # 32 bits may hold as little as 8; a PNG of 16 says itself that it has 16.
    shift = 0 if picture.mode == "I" and values.max() <= _EIGHT_BITS else 8
    return Image.fromarray((values >> shift).astype(np.uint8)).convert("RGB")


def _refusal(reason: str) -> RequestError:
    return RequestError(ErrorCode.INVALID_IMAGE, f"the image cannot be used: {reason}")
