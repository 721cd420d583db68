"""Bounds what all bodies take together while they are read: a queue has its bounds, but a request is in none
before its body is there.
"""

from __future__ import annotations

from gateway.errors import Unavailable

# Of every body so much passes uncounted, so that whoever fills the budget keeps out no short request. A
# connection has a buffer of this size anyway, and their number has a bound of its own.
_FREE = 64 * 2**10


class BodyBudget:
    """Bytes of the bodies that one gateway process reads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes of bodies that are being read."""
        return self._held

    def enter(self, declared: int) -> HeldBody:
        """A body of which a client says how long it is, or 0, that will be read now; to be closed when it is
        read. Raises Unavailable where there is no room for it: not a byte of it is read then.

        What is only declared is not set aside, or who declares much and sends nothing would keep out all.
        """
        self._check(declared - _FREE, self._held)
        return HeldBody(self)

    def grow(self, own: int, more: int) -> None:
        """A body that holds so many bytes takes more of them. Raises Unavailable."""
        self._check(own + more, self._held - own)
        self._held += more

    def give_back(self, n_bytes: int) -> None:
        """They are read, or thrown away."""
        self._held -= n_bytes

    def _check(self, own: int, others: int) -> None:
        # A body that is alone always has room: its own limit is for that.
        if own > 0 and others > 0 and own + others > self._max_bytes:
            raise Unavailable(
                f"the bodies of other requests, which are being read, take {others} of {self._max_bytes} "
                "bytes, and this one does not fit beside them; send it again in a second (the operator can "
                "raise the limit with GATEWAY_MAX_BODY_BYTES_TOTAL)",
                code="too_many_bodies",
            )


class HeldBody:
    """One body that is being read."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._held = 0

    def __enter__(self) -> HeldBody:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def grow(self, size: int) -> None:
        """So many bytes are there by now. Raises Unavailable."""
        more = max(0, size - _FREE) - self._held
        self._budget.grow(self._held, more)
        self._held += more

    def close(self) -> None:
        """Nothing of it is held any more."""
        self._budget.give_back(self._held)
        self._held = 0
