"""Bounds what all bodies take together while they are read, and all answers until they are sent: a queue has
its bounds, but a request is in none before its body is there, nor when its answer is.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.errors import Unavailable


@dataclass(frozen=True)
class _Kind:
    """Of what is held, for errors."""

    what: str
    doing: str
    setting: str
    code: str
    free: int
    """Of each so many bytes pass uncounted, so that whoever fills the budget keeps out no short request. The
    number of connections has a bound of its own.
    """


# A connection has a buffer of this size anyway.
_BODIES = _Kind("bodies", "read", "GATEWAY_MAX_BODY_BYTES_TOTAL", "too_many_bodies", 64 * 2**10)
_ANSWERS = _Kind("answers", "sent", "GATEWAY_MAX_ANSWER_BYTES_TOTAL", "too_many_answers", 256 * 2**10)


class ByteBudget:
    """Bytes that one gateway process holds."""

    def __init__(self, kind: _Kind, max_bytes: int) -> None:
        self.kind = kind
        self._max_bytes = max_bytes
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes that count."""
        return self._held

    def enter(self, declared: int = 0) -> HeldBytes:
        """One that will be held from now on, and of which is said how long it is, or 0; to be closed when it
        is no more. Raises Unavailable where there is no room for it.

        What is only declared is not set aside, or who declares much and sends nothing would keep out all.
        """
        self.check(declared - self.kind.free, self._held)
        return HeldBytes(self)

    def grow(self, own: int, more: int) -> None:
        """One that has so many bytes takes more of them. Raises Unavailable."""
        self.check(own + more, self._held - own)
        self._held += more

    def give_back(self, n_bytes: int) -> None:
        """They are held no more."""
        self._held -= n_bytes

    def check(self, own: int, others: int) -> None:
        """Raises Unavailable where one has no room beside others; alone it always has, for which it has a
        limit of its own.
        """
        kind = self.kind
        if own > 0 and others > 0 and own + others > self._max_bytes:
            raise Unavailable(
                f"the {kind.what} of other requests, which are being {kind.doing}, take {others} of "
                f"{self._max_bytes} bytes, and this one does not fit beside them; send it again in a second "
                f"(the operator can raise the limit with {kind.setting})",
                code=kind.code,
            )


class HeldBytes:
    """Of one request."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._size = self._held = 0

    def __enter__(self) -> HeldBytes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, n_bytes: int) -> None:
        """So many more are there. Raises Unavailable."""
        more = max(0, self._size + n_bytes - self._budget.kind.free) - self._held
        self._budget.grow(self._held, more)
        self._size += n_bytes
        self._held += more

    def check(self, more: int = 0) -> None:
        """Raises Unavailable where others leave no room for what is there and so many bytes more."""
        own = self._size + more - self._budget.kind.free
        self._budget.check(own, self._budget.held - self._held)

    def close(self) -> None:
        """Nothing of it is held any more."""
        self._budget.give_back(self._held)
        self._size = self._held = 0


def bodies(max_bytes: int) -> ByteBudget:
    """Of bodies while they are read."""
    return ByteBudget(_BODIES, max_bytes)


def answers(max_bytes: int) -> ByteBudget:
    """Of the numbers of answers, from when the server gives them until the client has them."""
    return ByteBudget(_ANSWERS, max_bytes)
