"""How many tokens a model's server answers in a second while it has work."""

from __future__ import annotations

import math

# Of what lies this many busy seconds back a third still counts.
_MEMORY_S = 5.0


class _DecayedRate:
    """Tokens by seconds, of which the latest weigh most."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        kept = math.exp(-seconds / _MEMORY_S)
        # What the time since the last answer weighs; the tokens were computed all along.
        weight = _MEMORY_S * (1 - kept)
        self._tokens = self._tokens * kept + tokens * (weight / seconds if seconds else 1.0)
        self._seconds = self._seconds * kept + weight

    @property
    def value(self) -> float | None:
        return self._tokens / self._seconds if self._tokens and self._seconds else None


class Throughput:
    """Of one model. A server with little to do tells what one request takes, not what it can do: as soon as
    it was seen with more than it had room for, only such times count.
    """

    def __init__(self) -> None:
        self._busy = _DecayedRate()
        self._full = _DecayedRate()
        self._since = 0.0
        self._was_full = False

    def begin(self, now: float) -> None:
        """Something is under way again, after nothing was."""
        self._since = now
        self._was_full = False

    def note(self, tokens: int, now: float, *, is_full: bool) -> None:
        """So many were answered; `is_full` where others wait for the room. 0 for what failed."""
        seconds, self._since = now - self._since, now
        self._busy.add(tokens, seconds)
        if self._was_full:
            self._full.add(tokens, seconds)
        self._was_full = is_full

    @property
    def tokens_per_s(self) -> float | None:
        """None where nothing was answered yet."""
        return self._full.value or self._busy.value
