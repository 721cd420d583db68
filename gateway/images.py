"""Where the images of a request come from: data URLs, bare base64, and, where it is allowed, the web.

Gives the bytes of encoded image files; what is in them is the image stage's business.
"""

from __future__ import annotations

import asyncio
import binascii
import re
from collections.abc import Iterator

from backends.contract import ErrorCode
from gateway.errors import BadRequest, root_of, shorten
from gateway.image_fetcher import ImageFetcher, Lookup, look_up
from gateway.settings import Settings

_TAKEN = "an image is a data URL (data:image/png;base64,...), an http(s) URL, or the base64 of an image file"
# Decoding more than that is not done between other requests' turns.
_LARGE = 256 * 2**10
# Decoding holds the interpreter's lock: 1 MB of it takes some milliseconds. A multiple of 4.
_SLICE = 2**20
_STANDARD = bytes.maketrans(b"-_", b"+/")
_BLANK = b" \t\r\n\f\v"
# What base64 and its blanks become where a whole URL was percent-encoded.
_PERCENT = {
    code: character
    for character in "+/=-_ \r\n\t"
    for code in {f"%{ord(character):02X}", f"%{ord(character):02x}"}
}
# How files of the formats begin that image stages read. A path or a word can be base64 too.
_BEGINNING = re.compile(
    rb"\x89PNG|\xff\xd8|GIF8|BM|II[*+]\0|MM\0[*+]|RIFF....WEBP|....ftyp",
    re.DOTALL,
)
_BEGINNING_BYTES = 12
_MAX_HEADER_LENGTH = 1000


class ImageLoader:
    """Reads references to images. One for each application."""

    def __init__(self, settings: Settings, lookup: Lookup = look_up) -> None:
        self._max_bytes = settings.max_image_bytes
        self.timeout_s = settings.images_timeout_s
        """For all images of one request."""
        self._fetcher = ImageFetcher(settings, lookup) if settings.fetches_images else None

    async def load(self, reference: str, field: str) -> bytes:
        """The file that a reference stands for: an http(s) URL, a data URL, or base64.

        `field` is what the client calls it, such as input[2].image. Raises BadRequest.
        """
        try:
            return await self._load(reference.strip())
        except BadRequest as refusal:
            raise BadRequest(
                f"{field}: {refusal.message}", param=root_of(field), code=ErrorCode.INVALID_IMAGE
            ) from None

    async def close(self) -> None:
        """Gives the connections back."""
        if self._fetcher is not None:
            await self._fetcher.close()

    async def _load(self, reference: str) -> bytes:
        beginning = reference[:8].lower()
        if beginning.startswith("data:"):
            return await self._decode(_data_of(reference))
        if beginning.startswith(("http://", "https://")):
            if self._fetcher is None:
                raise BadRequest(
                    f"this server does not fetch URLs ({shorten(reference.partition('?')[0])}); send the "
                    "image as a data URL (data:image/png;base64,...). Its operator can allow it with "
                    "--allow-image-urls"
                )
            return await self._fetcher.fetch(reference)
        if not _is_image_in_base64(reference):
            raise BadRequest(f"{shorten(reference)} is none of what is taken: {_TAKEN}")
        return await self._decode(reference)

    async def _decode(self, text: str) -> bytes:
        if len(text) <= _LARGE:
            return decode(text, self._max_bytes)
        return await asyncio.to_thread(decode, text, self._max_bytes)


def decode(text: str, max_bytes: int) -> bytes:
    """Base64 of either alphabet, with or without padding, blanks anywhere. Raises BadRequest."""
    try:
        digits = b"".join(_slices(text)).rstrip(b"=")
        size = len(digits) * 3 // 4
        if size > max_bytes:
            raise BadRequest(
                f"the image has {size} bytes; at most {max_bytes} are taken (the operator can raise the "
                "limit with GATEWAY_MAX_IMAGE_BYTES)"
            )
        if not digits:
            raise BadRequest("the image is empty")
        if b"=" in digits:
            raise BadRequest("its base64 goes on behind the padding")
        digits += b"=" * (-len(digits) % 4)
        return b"".join(
            binascii.a2b_base64(digits[at : at + _SLICE], strict_mode=True)
            for at in range(0, len(digits), _SLICE)
        )
    except (UnicodeEncodeError, binascii.Error) as error:
        raise BadRequest(f"its base64 cannot be read: {_explain(error)}") from None


def _slices(text: str) -> Iterator[bytes]:
    """The digits in pieces, in the standard alphabet, without blanks; a whole URL may be percent-encoded."""
    start = 0
    while start < len(text):
        stop = start + _SLICE
        # Not between a percent sign and its digits.
        sign = text.rfind("%", stop - 2, stop)
        stop = stop if sign < 0 else sign
        part = text[start:stop]
        if "%" in part:
            for code, character in _PERCENT.items():
                part = part.replace(code, character)
        yield part.encode("ascii").translate(_STANDARD, _BLANK)
        start = stop


def _explain(error: UnicodeEncodeError | binascii.Error) -> str:
    """Python's reason; the one of characters outside of ASCII would repeat the whole text."""
    if isinstance(error, UnicodeEncodeError):
        return f"it has the character {error.object[error.start]!r} in it"
    text = str(error)
    return text[:1].lower() + text[1:]


def _data_of(url: str) -> str:
    """The base64 in a data URL."""
    comma = url.find(",", 0, _MAX_HEADER_LENGTH)
    if comma < 0:
        raise BadRequest(
            f"the data URL {shorten(url)} has no comma in its first {_MAX_HEADER_LENGTH} characters, "
            "behind which its data would stand"
        )
    kind, *parameters = (part.strip().lower() for part in url[len("data:") : comma].split(";"))
    # Some clients write image alone.
    if kind not in ("image", "application/octet-stream") and not kind.startswith("image/"):
        raise BadRequest(
            f"the data URL {shorten(url)} has the media type {shorten(kind)}; image/... belongs there"
        )
    if "base64" not in parameters:
        raise BadRequest(
            f"the data URL {shorten(url)} is not in base64; write ;base64 before its comma, and the base64 "
            "of the file behind it"
        )
    return url[comma + 1 :]


def _is_image_in_base64(text: str) -> bool:
    """Whether a text begins as the base64 of an image file does."""
    digits = "".join(text[:64].split())[: _BEGINNING_BYTES // 3 * 4]
    try:
        beginning = decode(digits[: len(digits) // 4 * 4], _BEGINNING_BYTES)
    except BadRequest:
        return False
    return _BEGINNING.match(beginning) is not None
