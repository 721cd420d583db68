"""Places in a queue that are kept for requests which were told to come back later.

Under lasting overload a client that waits as long as it is told would else find its place taken by those who
came meanwhile. A request is known again by what it asks, so that nothing need be sent back and forth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

# Places are kept for so many times what the lane may hold: of ten times as many clients as fit each is told
# the truth (with once, five of six came in vain), and a flood that never comes back takes no more than that
# of anybody's time, and little memory.
_MOST_LANES = 16
_MOST_PLACES = 10_000
# Of the measured rate. A server on a shared machine becomes much slower within a minute, and who was told to
# come would pile up: where it goes on at two fifths of its rate, 33 of 717 who were told came in vain with
# 0.7 (and lane._HONOURED 1.5), of 666 nobody with this (tests/gateway/test_admission.py). What it does more
# newcomers take.
_PROMISED = 0.6
# Who comes so much later than told has given up. A second is lost to a header of whole seconds.
_PATIENCE_S = 3.0
# How much one who comes, or does not, says of the others.
_LEARNING = 0.1
# Clocks and timers differ by so much.
_EARLY_S = 0.05


@dataclass(eq=False)
class _Place:
    key: Hashable
    tokens: int
    due: float
    is_taken: bool = field(default=False, init=False)


class Places:
    """Of one lane. Times are those of one clock, in seconds."""

    def __init__(self, lane_tokens: int) -> None:
        """`lane_tokens` may wait in the lane."""
        self._most_tokens = _MOST_LANES * lane_tokens
        self._in_order: deque[_Place] = deque()
        self._by_key: dict[Hashable, deque[_Place]] = {}
        self._next_due = 0.0
        self._tokens = 0
        self._return_rate = 1.0
        """Of those who were told to come back the share that does, of late."""

    def keep(self, key: Hashable, tokens: int, now: float, wait_s: float, tokens_per_s: float) -> float:
        """The seconds after which a request is to come back: not before `wait_s`, and not before the server
        has done what others were told to come back with. Where too many have places none is kept, and
        nobody has to wait for it.
        """
        self.forget(now)
        due = max(now + wait_s, self._next_due)
        # Of those that were taken some are still in the order, behind one that was not.
        if self._tokens + tokens > self._most_tokens or len(self._in_order) >= _MOST_PLACES:
            return due - now
        self._next_due = due + tokens * self._return_rate / (tokens_per_s * _PROMISED)
        place = _Place(key, tokens, due)
        self._in_order.append(place)
        self._by_key.setdefault(key, deque()).append(place)
        self._tokens += tokens
        return due - now

    def take(self, key: Hashable, now: float) -> bool:
        """Whether a place was kept for a request, and it comes when it was told to."""
        self.forget(now)
        kept = self._by_key.get(key)
        if not kept or kept[0].due > now + _EARLY_S:
            return False
        self._drop(kept[0])
        self._learn(1.0)
        return True

    def tokens_until(self, time: float, now: float, tokens_per_s: float) -> int:
        """About how many tokens of those who were told to come by then are expected."""
        self.forget(now)
        if not self._in_order or self._in_order[0].due > time:
            return 0
        # They stand one behind the other, as they are paced.
        first = self._in_order[0]
        paced = first.tokens + (time - first.due) * tokens_per_s * _PROMISED
        return int(min(self._tokens, paced) * self._return_rate)

    def forget(self, now: float) -> None:
        """Gives up the places of those who did not come."""
        while self._in_order and (self._in_order[0].is_taken or self._in_order[0].due + _PATIENCE_S < now):
            place = self._in_order.popleft()
            if not place.is_taken:
                self._drop(place)
                self._learn(0.0)

    def _drop(self, place: _Place) -> None:
        place.is_taken = True
        self._tokens -= place.tokens
        kept = self._by_key[place.key]
        kept.popleft()
        if not kept:
            del self._by_key[place.key]

    def _learn(self, came: float) -> None:
        self._return_rate += _LEARNING * (came - self._return_rate)

    def __bool__(self) -> bool:
        return bool(self._by_key)
