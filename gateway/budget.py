"""How many tokens a minute a key may have computed."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """A bucket of one minute's tokens that fills evenly.

    A request may take out more than there is: the bucket goes below nothing, and until it is back there,
    nothing more is taken in.
    """

    def __init__(self, tokens_per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.tokens_per_minute = tokens_per_minute
        self._clock = clock
        self._level = float(tokens_per_minute)
        self._filled_at = clock()

    def level(self) -> float:
        """Tokens that are left; below zero after more was computed than was left."""
        now = self._clock()
        gained = (now - self._filled_at) * self.tokens_per_minute / 60
        self._level = min(self._level + gained, float(self.tokens_per_minute))
        self._filled_at = now
        return self._level

    def charge(self, n_tokens: int) -> None:
        """Takes out what a request has cost."""
        self._level = self.level() - n_tokens

    def wait_s(self) -> float:
        """Seconds until it is not below nothing any more; 0 when it is not."""
        return max(0.0, -self.level() * 60 / self.tokens_per_minute)


class Budgets:
    """One for each key that has a limit, by name, so that they outlive a new look at the keys' file."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._budgets: dict[str, Budget] = {}

    def of(self, name: str, tokens_per_minute: int) -> Budget:
        """A key's budget; a new one when its limit has changed."""
        budget = self._budgets.get(name)
        if budget is None or budget.tokens_per_minute != tokens_per_minute:
            budget = self._budgets[name] = Budget(tokens_per_minute, self._clock)
        return budget
