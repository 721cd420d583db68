"""What a JSON body is made of, before any of it becomes objects: how deep it nests, and how much there is.

A parser holds the event loop, and makes of a list that takes three bytes an object of 64: 6 MB of them took
0.8 s, and 32 MB would have made 1 GB. To count in the bytes costs a hundredth of that.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gateway.errors import BadRequest, BodyTooLarge

# A request's own fields need seven levels; documents to rerank may hold whatever their owner needs.
MAX_DEPTH = 64
# Twenty for each of ten thousand documents; they take 60 ms and 50 MB at most.
MAX_CONTAINERS = 200_000
# Twice the token ids that a request may have, unless an operator says otherwise.
MAX_VALUES = 2_000_000

# What fits into the cache; nobody counts on when there is too much already.
_PIECE = 2**18
_NOT_MARKS = bytes(set(range(256)) - set(b'"[]{},'))
_QUOTE, _COMMA = b'",'
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1


def check_shape(body: bytes) -> None:
    """Raises BadRequest for what is nested too deep, and BodyTooLarge for too many lists, objects and values.

    Of a body that is no JSON it may say anything, or nothing.
    """
    most_containers = body.count(b"[") + body.count(b"{")
    if most_containers <= MAX_DEPTH and most_containers + body.count(b",") <= MAX_VALUES:
        # The usual body: enough is known without a look at what is text in it.
        return
    for containers, values, depth in measure(body):
        if containers > MAX_CONTAINERS:
            raise _too_many("lists and objects", MAX_CONTAINERS)
        if values > MAX_VALUES:
            raise _too_many("values", MAX_VALUES)
        if depth > MAX_DEPTH:
            raise BadRequest(
                f"the body has lists and objects nested more than {MAX_DEPTH} deep; no request needs so many",
                code="invalid_json",
            )


def measure(body: bytes) -> Iterator[tuple[int, int, int]]:
    """After each piece of a JSON body what there is of it so far: lists and objects; values (an empty list
    counts for one); and how deep they nest.
    """
    # A run of backslashes begins inside a string, so pairs of them are found from its beginning.
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    containers = commas = level = deepest = is_open = 0
    for start in range(0, len(unescaped), _PIECE):
        marks = np.frombuffer(unescaped[start : start + _PIECE].translate(None, _NOT_MARKS), np.uint8)
        # Its overflow does not matter: whether it is odd says whether a string is open.
        quotes = np.cumsum(marks == _QUOTE, dtype=np.uint8) + np.uint8(is_open)
        outside = marks[quotes & 1 == 0]
        levels = level + np.cumsum(_STEPS[outside], dtype=np.int64)
        if len(marks):
            is_open = int(quotes[-1]) & 1
        if len(outside):
            level, deepest = int(levels[-1]), max(deepest, int(levels.max()))
        commas += int(np.count_nonzero(outside == _COMMA))
        containers += int(np.count_nonzero(_STEPS[outside] > 0))
        yield containers, containers + commas, deepest


def _too_many(what: str, limit: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the body has more than {limit} {what}; send fewer inputs at a time",
        code="too_many_values",
    )
