"""The items of a client's request -> server requests of about equal work, and their answers back in order.

A server request has texts only, or items with images only: the two go to ensembles of their own, and texts
pass no image stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from backends.contract import COUNT_OF, IMAGE, TEXT
from gateway.pipeline import Pipeline

Array = npt.NDArray[Any]

# Encoded images of one server request. They are copied on their way, and a large request holds up small ones.
_MAX_IMAGE_BYTES = 16 * 2**20
# Of the token budget items with images take such a part: texts that come after them do not wait long.
_IMAGE_SHARE = 4


@dataclass(frozen=True)
class Content:
    """An item with images."""

    text: bytes
    """UTF-8; empty where the item has images only."""
    images: tuple[bytes, ...]
    """Encoded image files, at least one."""


Item = bytes | tuple[bytes, bytes] | Content
"""A text, a pair of texts, or what has images."""
Answer = Array | list[Array]
"""One row for each item, or for outputs of different length an array for each item."""


@dataclass(frozen=True)
class Part:
    """The items of one server request."""

    places: list[int]
    """Where they stand in the client's list."""
    has_images: bool
    tokens: int
    """About as many as they have at most."""
    size: int
    """Bytes."""


def size(item: Item) -> int:
    """Bytes of an item."""
    return text_size(item) + sum(map(len, _images_of(item)))


def text_size(item: Item) -> int:
    """Bytes of its texts."""
    return sum(map(len, _texts_of(item)))


def cut(items: Sequence[Item], pipeline: Pipeline) -> list[Part]:
    """The server requests: items of one are of about one size, so that none waits for a much longer one.

    Within the model's batch size, and within its token budget as far as bytes tell: a token of natural text
    has two bytes and more, and an image as many tokens as it may have. Images also within a number of bytes.
    """
    kinds: tuple[list[int], list[int]] = ([], [])
    for i, item in enumerate(items):
        kinds[isinstance(item, Content)].append(i)
    budgets = pipeline.max_batch_tokens, pipeline.max_batch_tokens // _IMAGE_SHARE
    parts = []
    for has_images, those, budget in zip((False, True), kinds, budgets, strict=True):
        loads = {i: _load(items[i], pipeline) for i in those}
        for places in _cut(loads, pipeline.max_batch_size, budget):
            own = [loads[i] for i in places]
            tokens, size = sum(load.tokens for load in own), sum(load.size for load in own)
            parts.append(Part(places, has_images, tokens, size))
    return parts


class _Load(NamedTuple):
    """What an item weighs. Sorts by what should share a server request: each item of one has room for as many
    images as any other, and waits for the longest.
    """

    images: int
    size: int
    tokens: int
    """About as many as it has at most."""
    image_bytes: int


def _load(item: Item, pipeline: Pipeline) -> _Load:
    images = _images_of(item)
    image_bytes = sum(map(len, images))
    text_bytes = sum(map(len, _texts_of(item)))
    tokens = min(text_bytes // 2 + 2, pipeline.max_length) + len(images) * pipeline.max_image_tokens
    return _Load(len(images), text_bytes + image_bytes, tokens, image_bytes)


def _cut(loads: Mapping[int, _Load], most_items: int, most_tokens: int) -> list[list[int]]:
    def fits(count: int, tokens: int, image_bytes: int) -> bool:
        return count <= most_items and tokens <= most_tokens and image_bytes <= _MAX_IMAGE_BYTES

    every = loads.values()
    if fits(len(loads), sum(load.tokens for load in every), sum(load.image_bytes for load in every)):
        return [list(loads)] if loads else []
    parts: list[list[int]] = []
    tokens = image_bytes = 0
    for i in sorted(loads, key=loads.__getitem__):
        load = loads[i]
        tokens += load.tokens
        image_bytes += load.image_bytes
        if not parts or not fits(len(parts[-1]) + 1, tokens, image_bytes):
            parts.append([])
            tokens, image_bytes = load.tokens, load.image_bytes
        parts[-1].append(i)
    return parts


def tensors(items: Sequence[Item], stage: str | None) -> dict[str, Array]:
    """The inputs of one server request, for an ensemble or for one stage alone: `text` [n, 1], of pairs
    [n, 2], and of items with images `image` [n, k], where k is the most images of an item.
    """
    made: dict[str, Array] = {}
    if stage != "image":
        made[TEXT] = np.array(list(map(_texts_of, items)), dtype=np.object_)
    rows = list(map(_images_of, items))
    most = max(map(len, rows))
    if most:
        made[IMAGE] = np.array([row + (b"",) * (most - len(row)) for row in rows], dtype=np.object_)
    return made


def _texts_of(item: Item) -> tuple[bytes, ...]:
    if isinstance(item, bytes):
        return (item,)
    return (item.text,) if isinstance(item, Content) else item


def _images_of(item: Item) -> tuple[bytes, ...]:
    return item.images if isinstance(item, Content) else ()


def merge(name: str, answers: Sequence[Mapping[str, Array]], parts: Sequence[Part], count: int) -> Answer:
    """One output of several server requests, in the order of the client's items."""
    if name in COUNT_OF:
        pieces: list[Array] = [np.empty(0)] * count
        for answer, part in zip(answers, parts, strict=True):
            ends = np.cumsum(answer[COUNT_OF[name]][:, 0])
            for i, piece in zip(part.places, np.split(answer[name][0], ends[:-1]), strict=True):
                pieces[i] = piece
        return pieces
    rows = [answer[name] for answer in answers]
    if len(rows) == 1:
        return rows[0]
    merged = np.empty((count, *rows[0].shape[1:]), rows[0].dtype)
    for part, row in zip(parts, rows, strict=True):
        merged[part.places] = row
    return merged
