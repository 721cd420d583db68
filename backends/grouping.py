"""Cuts a list into neighbours that are small enough together."""

from __future__ import annotations

from collections.abc import Iterable


def neighbours(sizes: Iterable[int], limit: int) -> list[range]:
    """Places of the members of each group, whose sizes add up to at most `limit`; one that is larger is
    alone.
    """
    groups: list[range] = []
    start = total = end = 0
    for end, size in enumerate(sizes, 1):
        if end - 1 > start and total + size > limit:
            groups.append(range(start, end - 1))
            start, total = end - 1, 0
        total += size
    return [*groups, range(start, end)]
