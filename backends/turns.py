"""Which of the waiting sequences are computed next.

A turn holds sequences of several requests, within a number of tokens. It begins in turn with the request that
has the fewest tokens left and with the oldest: the first keeps a short request from waiting behind long ones,
the second keeps a long one from waiting for ever. A long request takes several turns.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from backends.ragged import Lengths

T = TypeVar("T")
Places = npt.NDArray[np.intp]


@dataclass(eq=False)
class Job(Generic[T]):
    """A request of several sequences."""

    content: T
    lengths: Lengths
    """[n] tokens of each sequence."""
    order: Places = field(init=False)
    """Longest first, as they are taken: neighbours of about one length make good passes."""
    taken: int = 0
    """Sequences that were handed out."""
    tokens_left: int = field(init=False)
    number: int = field(init=False)
    """Its place among all that came."""

    def __post_init__(self) -> None:
        self.order = np.argsort(-self.lengths, kind="stable")
        self.tokens_left = int(self.lengths.sum())

    def take(self, room: int, *, is_first: bool, is_whole: bool) -> Places:
        """Places of the next sequences that fit, ascending; at least one if it `is_first`, all or none if it
        `is_whole`.
        """
        ahead = self.order[self.taken :]
        sums = np.cumsum(self.lengths[ahead])
        count = int(np.searchsorted(sums, room, side="right"))
        if is_first:
            count = max(count, 1)
        if is_whole:
            count = len(ahead) if is_first or count == len(ahead) else 0
        self.taken += count
        if count:
            self.tokens_left -= int(sums[count - 1])
        return np.sort(ahead[:count])

    def give_back(self, count: int) -> Places:
        """The opposite of take, for the last `count` sequences; their places."""
        self.taken -= count
        back = self.order[self.taken : self.taken + count]
        self.tokens_left += int(self.lengths[back].sum())
        return back


class Piece(NamedTuple, Generic[T]):
    """Sequences of one request."""

    job: Job[T]
    places: Places


def halve(pieces: Sequence[Piece[T]], *, is_whole: bool) -> list[list[Piece[T]]]:
    """Two batches of about as many sequences; one where there is nothing to cut. `is_whole` keeps the
    sequences of a request together.
    """
    if len(pieces) == 1 and not is_whole:
        job, places = pieces[0]
        middle = len(places) // 2
        return [[Piece(job, half)] for half in (places[:middle], places[middle:]) if len(half)]
    middle = len(pieces) // 2
    return [half for half in (list(pieces[:middle]), list(pieces[middle:])) if half]


class Turns(Generic[T]):
    """The requests that wait, in the order in which they came."""

    def __init__(
        self,
        budget: int,
        *,
        is_whole: bool = False,
        reach: int = 1,
        measure: Callable[[Sequence[Piece[T]]], int] | None = None,
    ) -> None:
        """`budget` tokens a turn; `is_whole` keeps the sequences of a request together.

        Where sequences share tokens that are computed once, `measure` tells how many tokens pieces make, and
        up to `reach` budgets are looked at to fill one; not with `is_whole`.
        """
        assert measure is None or not is_whole
        self.budget = budget
        self.is_whole = is_whole
        self._reach = reach
        self._measure = measure
        self._jobs: list[Job[T]] = []
        self._n_added = 0
        self._begins_with_oldest = False

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job[T]]:
        return iter(self._jobs)

    def add(self, job: Job[T]) -> None:
        """Puts a request at the end."""
        job.number = self._n_added
        self._n_added += 1
        self._jobs.append(job)

    def drop(self, jobs: Iterable[Job[T]]) -> None:
        """Takes requests out, whatever is left of them."""
        gone = set(map(id, jobs))
        self._jobs = [job for job in self._jobs if id(job) not in gone]

    def take(self) -> list[Piece[T]]:
        """The next turn: at most `budget` tokens, or one longer sequence. Empty where nothing waits."""
        pieces = self._take(self.budget * self._reach)
        while (
            self._measure is not None
            and sum(len(piece.places) for piece in pieces) > 1
            and self._measure(pieces) > self.budget
        ):
            job, places = pieces.pop()
            back = job.give_back(-(-len(places) // 2))
            if len(back) < len(places):
                pieces.append(Piece(job, np.setdiff1d(places, back, assume_unique=True)))
            if job not in self._jobs:
                insort(self._jobs, job, key=lambda one: one.number)
        return pieces

    def _take(self, room: int) -> list[Piece[T]]:
        waiting = sorted(self._jobs, key=lambda job: job.tokens_left)
        if self._begins_with_oldest and waiting:
            waiting.remove(self._jobs[0])
            waiting.insert(0, self._jobs[0])
        self._begins_with_oldest = not self._begins_with_oldest
        pieces: list[Piece[T]] = []
        for job in waiting:
            before = job.tokens_left
            places = job.take(room, is_first=not pieces, is_whole=self.is_whole)
            if not len(places):
                break
            pieces.append(Piece(job, places))
            room -= before - job.tokens_left
            if job.taken < len(job.order):
                break
        self._jobs = [job for job in self._jobs if job.taken < len(job.order)]
        return pieces
