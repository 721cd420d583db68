"""What an encoder has computed, in numbers: threads that compute add to them, and one that reports takes
them. Adding costs a microsecond or two, for each pass and never for each text.
"""

from __future__ import annotations

import threading
from collections import Counter
from enum import StrEnum

PASS_TOKENS = (16, 64, 256, 1024, 4096, 16384, 65536)
"""Up to how many tokens a pass may have to be counted in a class of its own."""


class Count(StrEnum):
    """What is counted."""

    TURNS = "turns"
    PASSES = "passes"
    TOKENS = "tokens"
    """That a pass computed, those that it shared counted once, padding left out."""
    PADDING = "padding"
    SHARED = "shared"
    """Tokens that were not computed, because another text of the pass begins with the same."""
    OUT_OF_MEMORY = "out_of_memory"
    """Passes that were tried again in smaller ones."""
    EXPIRED = "expired"
    """Requests whose deadline had passed before they were computed."""


class Tally:
    """Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[Count] = Counter()
        self._sizes: Counter[int] = Counter()

    def add(self, count: Count, amount: int = 1) -> None:
        """Adds to one of them."""
        with self._lock:
            self._counts[count] += amount

    def add_pass(self, tokens: int, *, padding: int = 0, shared: int = 0) -> None:
        """A forward pass over `tokens` tokens, which computed `padding` more in vain, and stood for `shared`
        more.
        """
        bound = next((bound for bound in PASS_TOKENS if tokens <= bound), 0)
        with self._lock:
            self._counts[Count.PASSES] += 1
            self._counts[Count.TOKENS] += tokens
            self._counts[Count.PADDING] += padding
            self._counts[Count.SHARED] += shared
            self._sizes[bound] += 1

    def take(self) -> tuple[Counter[Count], Counter[int]]:
        """What was added since the last time: counts, and passes by the smallest of PASS_TOKENS that they
        are within; 0 for larger ones.
        """
        with self._lock:
            taken = self._counts, self._sizes
            self._counts, self._sizes = Counter(), Counter()
        return taken
