"""Takes sequences apart so that what several of them begin with is computed once.

In a causal model a token's hidden state depends on the tokens before it only, so sequences with the same
first tokens have the same states there. The sequences of a batch make a tree: a node is a run of tokens that
all below it begin with, and its keys and values serve them all. Everything runs in one packed pass, in which
every segment looks at the segments above it and at itself.

What is shared is found from the token ids alone, so it does not matter whose requests they are: the prompt of
a reranker, the instruction of a query, a text that came twice.

*Source:* the idea is that of radix trees over key/value caches (SGLang's RadixAttention) within one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Ranges = tuple[tuple[int, int], ...]
"""From and to, in the packed row: where the tokens before a segment are."""

# A shorter common beginning costs more than it saves: every segment is a product of its own in the attention.
MIN_SHARED = 16
# Nodes above one another. Texts that go on from each other make deeper trees, of which the rest is not
# shared.
_MAX_DEPTH = 8


@dataclass(frozen=True)
class Pass:
    """One forward pass over segments: whole sequences, or parts of them."""

    row: Ids
    """[u] places in the batch of the tokens of all segments end to end."""
    lengths: Ids
    """[s] tokens of each segment."""
    starts: Ids
    """[s] the position of each segment's first token in its sequences."""
    prefixes: tuple[Ranges, ...]
    """[s] what each segment looks at besides itself."""
    tokens: Ids
    """[t] places in the batch of the tokens whose states this pass makes."""
    sources: Ids
    """[t] where in the packed row each of their states is."""

    @property
    def shares(self) -> bool:
        """Whether anything is shared."""
        return any(self.prefixes)


def plan(ids: Ids, lengths: Ids, max_tokens: int, min_shared: int = MIN_SHARED) -> Iterator[Pass]:
    """Passes of at most `max_tokens` tokens, shared ones counted once; a longer sequence runs alone.

    `ids` [t] of sequences end to end, `lengths` [n]. Groups with the longest sequence come first.
    """
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    trees = [
        tree
        for alike in _alike(ids, offsets, min_shared)
        for tree in _grow(ids, offsets, alike, max_tokens, min_shared)
    ]
    # Within a pass neighbours of one length run as one batch; over passes memory runs out first or never.
    trees.sort(key=lambda tree: -tree.longest)
    start, total = 0, 0
    for end, tree in enumerate(trees):
        if end > start and total + tree.size > max_tokens:
            yield _join(offsets, trees[start:end])
            start, total = end, 0
        total += tree.size
    yield _join(offsets, trees[start:])


def count_distinct(ids: Ids, lengths: Ids, min_shared: int = MIN_SHARED) -> int:
    """About how many tokens `plan` computes, all passes together: what begins alike is counted once."""
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    distinct = int(lengths.sum())
    for group in _alike(ids, offsets, min_shared):
        if len(group) > 1:
            rows = sorted((ids[offsets[i] : offsets[i + 1]] for i in group), key=_sortable)
            distinct -= sum(_common(a, b) for a, b in pairwise(rows))
    return distinct


def _sortable(row: Ids) -> bytes:
    """Big-endian numbers compare as bytes as they do as numbers."""
    return row.astype(">i8").tobytes()


def _alike(ids: Ids, offsets: Ids, min_shared: int) -> list[list[int]]:
    """Sequences in groups of those that begin with the same `min_shared` tokens."""
    groups: dict[bytes, list[int]] = {}
    for i in range(len(offsets) - 1):
        begin, end = int(offsets[i]), int(offsets[i + 1])
        # What is shorter shares nothing, but with a number in front it stays out of the way of the others.
        head = ids[begin : begin + min_shared].tobytes() if end - begin >= min_shared else b"%d" % i
        groups.setdefault(head, []).append(i)
    return list(groups.values())


def _grow(ids: Ids, offsets: Ids, group: list[int], max_tokens: int, min_shared: int) -> Iterator[_Tree]:
    """Trees of at most `max_tokens` tokens, or of one sequence, for sequences that begin alike."""

    def tokens(i: int) -> bytes:
        return _sortable(ids[offsets[i] : offsets[i + 1]])

    waiting = [sorted(group, key=tokens) if len(group) > 1 else group]
    while waiting:
        members = waiting.pop()
        tree = _Tree(ids, offsets, members, min_shared)
        if tree.size <= max_tokens or len(members) == 1:
            yield tree
        else:
            middle = len(members) // 2
            waiting += [members[middle:], members[:middle]]


def _common(a: Ids, b: Ids) -> int:
    """How many tokens both begin with."""
    least = min(len(a), len(b))
    differ = a[:least] != b[:least]
    return int(differ.argmax()) if differ.any() else least


@dataclass(frozen=True)
class _Segment:
    """Tokens from `start` to `stop` of a sequence, which others may share; `above` are indices of
    segments.
    """

    sequence: int
    start: int
    stop: int
    above: tuple[int, ...]


class _Tree:
    """The segments of sequences, sorted by their tokens, that begin alike."""

    def __init__(self, ids: Ids, offsets: Ids, members: Sequence[int], min_shared: int) -> None:
        self.members = members
        self.min_shared = min_shared
        self.lengths = [int(offsets[i + 1] - offsets[i]) for i in members]
        rows = [ids[offsets[i] : offsets[i + 1]] for i in members]
        self.common = [0, *(_common(a, b) for a, b in pairwise(rows))]
        self.segments: list[_Segment] = []
        self.paths: list[tuple[int, ...]] = [()] * len(members)
        """Of each member the segments that make it."""
        self._split(0, len(members), 0, ())
        self.longest = max(self.lengths)
        self.size = sum(segment.stop - segment.start for segment in self.segments)

    def _split(self, low: int, high: int, depth: int, above: tuple[int, ...]) -> None:
        """Members from `low` to `high`, of whose tokens the first `depth` are in the segments `above`."""
        if high - low > 1 and len(above) < _MAX_DEPTH:
            shared = min(self.common[low + 1 : high])
            if shared - depth >= self.min_shared:
                above = (*above, self._add(low, depth, shared, above))
                depth = shared
        start = low
        for i in range(low + 1, high + 1):
            is_child = i < high and self.common[i] - depth >= self.min_shared and len(above) < _MAX_DEPTH
            if is_child:
                continue
            if i - start > 1:
                self._split(start, i, depth, above)
            else:
                own = (
                    ()
                    if self.lengths[start] == depth
                    else (self._add(start, depth, self.lengths[start], above),)
                )
                self.paths[start] = (*above, *own)
            start = i

    def _add(self, member: int, start: int, stop: int, above: tuple[int, ...]) -> int:
        self.segments.append(_Segment(self.members[member], start, stop, above))
        return len(self.segments) - 1


def _join(offsets: Ids, trees: Sequence[_Tree]) -> Pass:
    """The segments of trees in one packed row, those side by side that run as one batch."""
    segments = [(tree, i) for tree in range(len(trees)) for i in range(len(trees[tree].segments))]

    def alike(place: tuple[int, int]) -> tuple[int, int, tuple[int, ...]]:
        segment = trees[place[0]].segments[place[1]]
        length = segment.stop - segment.start
        return (-length, place[0], segment.above) if segment.above else (-length, -1, ())

    segments.sort(key=alike)
    lengths = np.array([_length(trees[tree].segments[i]) for tree, i in segments], np.int64)
    ends = np.cumsum(lengths)
    places = {
        place: (int(end - length), int(end))
        for place, end, length in zip(segments, ends, lengths, strict=True)
    }
    rows, starts, prefixes = [], [], []
    for tree, i in segments:
        segment = trees[tree].segments[i]
        begin = int(offsets[segment.sequence])
        rows.append(np.arange(begin + segment.start, begin + segment.stop))
        starts.append(segment.start)
        prefixes.append(tuple(places[tree, parent] for parent in segment.above))
    tokens: list[Ids] = []
    sources: list[Ids] = []
    for tree, grown in enumerate(trees):
        for member, path in zip(grown.members, grown.paths, strict=True):
            tokens.append(np.arange(offsets[member], offsets[member + 1]))
            sources.extend(np.arange(*places[tree, i]) for i in path)
    return Pass(
        np.concatenate(rows),
        lengths,
        np.array(starts, np.int64),
        tuple(prefixes),
        np.concatenate(tokens),
        np.concatenate(sources),
    )


def _length(segment: _Segment) -> int:
    return segment.stop - segment.start
