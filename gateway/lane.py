"""A lane of requests that wait for a model's server, and the tickets with which they wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Protocol

from gateway.context import Lane
from gateway.places import Places

# What of the bounds may wait where those who were told to come back do.
_HONOURED = 2.0


class Price(NamedTuple):
    """What a client request costs while it waits."""

    tokens: int
    size: int
    """Bytes."""


@dataclass(frozen=True)
class LaneState:
    """Of one lane, now and since the start."""

    queued_tokens: int
    max_queued_tokens: int
    queued_bytes: int
    queued_requests: int
    rejected: int
    """Client requests that were refused because too much waited."""
    expired: int
    """Client requests whose time was over while some of it waited."""


class Room(Protocol):
    """The server's, as the tickets see it."""

    def join(self, ticket: Ticket, lane: LaneQueue) -> None:
        """Puts a request at the end of its lane."""

    def dispatch(self) -> None:
        """Sends what there is room for."""

    def finish(self, tokens: int, *, answered: int, is_express: bool) -> None:
        """A server request has left the server, `answered` tokens of it with an answer."""


class Waiter(NamedTuple):
    """A server request that waits."""

    tokens: int
    size: int
    is_granted: asyncio.Future[bool]
    """Its result is whether it goes by the express account."""


class LaneQueue:
    """Client requests in the order in which they came, and how many of their tokens wait."""

    def __init__(self, lane: Lane, share: float, most_tokens: int, most_bytes: int) -> None:
        self.lane = lane
        self.share = share
        self.most_tokens = most_tokens
        self.most_bytes = most_bytes
        self.clock = 0.0
        """Tokens sent, by the lane's share."""
        self.tickets: deque[Ticket] = deque()
        self.unbegun: deque[Ticket] = deque()
        """Those of which nothing was sent yet, and maybe others."""
        self.places = Places(most_tokens)
        self.tokens = self.bytes = self.requests = self.rejected = self.expired = 0
        self.charged = 0
        """Tokens as they count for the bound: of one request no more than half of it, so that a huge
        one, which holds up nobody, keeps nobody out.
        """

    def head(self, budget: int) -> tuple[Ticket, Waiter] | None:
        """Who is next; one that has used up a budget has gone to the end."""
        while self.tickets:
            ticket = self.tickets[0]
            waiter = ticket.first()
            if waiter is None:
                self.tickets.popleft().is_in_lane = False
            elif ticket.turn_left < waiter.tokens and ticket.turn_left < budget:
                ticket.turn_left = budget
                self.tickets.rotate(-1)
            else:
                return ticket, waiter
        return None

    def first_unbegun(self) -> tuple[Ticket, Waiter] | None:
        """Who came first of those of which nothing was sent yet."""
        while self.unbegun:
            ticket = self.unbegun[0]
            waiter = None if ticket.has_begun else ticket.first()
            if waiter is not None:
                return ticket, waiter
            self.unbegun.popleft()
        return None

    def join(self, ticket: Ticket, budget: int) -> None:
        """Puts a request at the end."""
        ticket.turn_left = budget
        ticket.is_in_lane = True
        self.tickets.append(ticket)
        # Nobody else may ask for long, and what has begun must not pile up.
        self.first_unbegun()
        if not ticket.has_begun:
            self.unbegun.append(ticket)

    def has_room(self, price: Price, key: Callable[[], Hashable], now: float, rate: float | None) -> bool:
        """Whether a request may wait here, given the tokens a second that the lane advances by. An empty lane
        takes anything.
        """
        if not self.requests:
            return True
        size = self.bytes + price.size
        if self.places and self.places.take(key(), now):
            # The server may have become slower than it was when it was promised.
            tokens = self.charged + self._charge(price.tokens)
            return tokens <= self.most_tokens * _HONOURED and size <= self.most_bytes * _HONOURED
        promised = 0 if rate is None else self.promised(now, rate)
        return self.charged + price.tokens + promised <= self.most_tokens and size <= self.most_bytes

    def keep_place(self, price: Price, key: Hashable, now: float, rate: float) -> float:
        """The seconds after which a request that has no room is to come back."""
        if not self.lacks_bytes(price):
            return self.places.keep(key, self._charge(price.tokens), now, self.charged / rate, rate)
        # All bytes that wait are gone when all tokens are, and it takes as much of that as it has bytes.
        tokens = max(price.tokens, self.tokens * price.size // self.bytes)
        return self.places.keep(key, tokens, now, self.tokens / rate, rate)

    def _charge(self, tokens: int) -> int:
        """What so many of one request count for."""
        return min(tokens, self.most_tokens // 2)

    def lacks_bytes(self, price: Price) -> bool:
        """Whether it is for its bytes that a request has no room."""
        has_tokens = self.charged + price.tokens <= self.most_tokens
        return has_tokens and self.bytes + price.size > self.most_bytes

    def promised(self, now: float, rate: float) -> int:
        """Tokens for which room is kept: of those who were told to come before what waits now is done. Half
        of the lane is open to everybody.
        """
        until = now + self.charged / rate
        return min(self.places.tokens_until(until, now, rate), self.most_tokens // 2)

    def count(self, tokens: int, size: int, *, before: int) -> None:
        """So much more (or less) of a request waits, of which `before` tokens did."""
        self.tokens += tokens
        self.bytes += size
        self.charged += self._charge(before + tokens) - self._charge(before)
        self.requests += (before + tokens > 0) - (before > 0)

    def state(self) -> LaneState:
        """For metrics."""
        return LaneState(
            self.tokens, self.most_tokens, self.bytes, self.requests, self.rejected, self.expired
        )


class Ticket:
    """One client request, from when it was let in until it is answered: `with ticket: async with
    ticket.turn(tokens): ...` for each of its server requests.
    """

    def __init__(self, room: Room, lane: LaneQueue, price: Price, budget: int) -> None:
        self._room = room
        self._lane = lane
        self._waiters: deque[Waiter] = deque()
        self._tokens, self._bytes = price
        self.turn_left = budget
        self.is_in_lane = False
        self.has_begun = False
        self.sent = 0
        """Tokens that went to the server so far."""
        lane.count(*price, before=0)

    @property
    def lane(self) -> Lane:
        """The one that it waits in."""
        return self._lane.lane

    def turn(self, tokens: int, size: int) -> Turn:
        """Waits until the server has room for a server request, and counts it while it is there."""
        return Turn(self, tokens, size)

    def first(self) -> Waiter | None:
        """Its next server request that still waits."""
        while self._waiters and self._waiters[0].is_granted.done():
            self._waiters.popleft()
        return self._waiters[0] if self._waiters else None

    async def wait(self, tokens: int, size: int) -> bool:
        """Whether it goes by the express account."""
        waiter = Waiter(tokens, size, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        if not self.is_in_lane:
            self._room.join(self, self._lane)
        self._room.dispatch()
        try:
            return await waiter.is_granted
        except asyncio.CancelledError:
            if waiter.is_granted.cancelled():
                # What stands behind it may be smaller.
                self._room.dispatch()
            else:
                self._room.finish(tokens, answered=0, is_express=waiter.is_granted.result())
            raise

    def done(self, tokens: int, *, is_express: bool, is_answered: bool) -> None:
        """A server request of it has left the server."""
        self._room.finish(tokens, answered=tokens if is_answered else 0, is_express=is_express)

    def grant(self, *, is_express: bool) -> None:
        """Sends the next server request on its way."""
        waiter = self._waiters.popleft()
        self.has_begun = True
        self.turn_left -= waiter.tokens
        self.sent += waiter.tokens
        self._leave(waiter.tokens, waiter.size)
        waiter.is_granted.set_result(is_express)

    def _leave(self, tokens: int, size: int) -> None:
        self._lane.count(-tokens, -size, before=self._tokens)
        self._tokens -= tokens
        self._bytes -= size

    def expire(self) -> None:
        """Its time is over."""
        if self._tokens > 0:
            self._lane.expired += 1

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *exception: object) -> None:
        """What of it still waits is forgotten."""
        if self._tokens > 0:
            self._leave(self._tokens, self._bytes)


class Turn:
    """One server request's stay at the server."""

    def __init__(self, ticket: Ticket, tokens: int, size: int) -> None:
        self._ticket = ticket
        self._tokens = tokens
        self._size = size
        self._is_express = False

    async def __aenter__(self) -> None:
        self._is_express = await self._ticket.wait(self._tokens, self._size)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ticket.done(self._tokens, is_express=self._is_express, is_answered=kind is None)


class FreePass:
    """In place of a ticket, for what is not held up."""

    def turn(self, tokens: int, size: int) -> contextlib.AbstractAsyncContextManager[None]:
        """At once."""
        return contextlib.nullcontext()

    def expire(self) -> None:
        """Its time is over."""

    def __enter__(self) -> FreePass:
        return self

    def __exit__(self, *exception: object) -> None:
        pass
