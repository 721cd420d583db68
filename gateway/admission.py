"""Which work is sent to the server next. Work is priced in tokens; the server of a model has a bounded number
of them, the rest waits here, in a lane for what is urgent and one for bulk, and more than a bound is refused.

A client request gives up its turn after one token budget of its server requests, so that none waits for the
whole of another. Both lanes advance by their shares where both have work. All of it is of one gateway
process.

*Source:* the order of the lanes is start-time fair queueing (Goyal, Vin and Cheng, 1996), that within a lane
deficit round robin (Shreedhar and Varghese, 1995).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

from gateway.context import Lane
from gateway.errors import TooManyRequests
from gateway.places import Places
from gateway.throughput import Throughput

# What an urgent request may have at the server beside a full measure of other work, as part of that measure.
_EXPRESS_SHARE = 0.25
# Before anything was answered nobody knows how long it takes.
_UNKNOWN_WAIT_S = 1.0


@dataclass(frozen=True)
class AdmissionLimits:
    """What an operator may set, for each model and each process of the gateway."""

    in_flight_budgets: float = 2.0
    """Token budgets of the pipeline that the server has at once."""
    interactive_share: float = 0.75
    """Of the tokens, where both lanes have work."""
    max_queued_tokens: Mapping[Lane, int] = field(
        default_factory=lambda: {Lane.INTERACTIVE: 250_000, Lane.BULK: 2_000_000}
    )
    max_queued_bytes: int = 256 * 2**20
    """Of texts and images that wait, in each lane."""


class Price(NamedTuple):
    """What a client request costs while it waits."""

    tokens: int
    size: int
    """Bytes."""


@dataclass(frozen=True)
class LaneState:
    """Of one lane, now and since the start."""

    queued_tokens: int
    queued_bytes: int
    queued_requests: int
    rejected: int
    """Client requests that were refused because too much waited."""
    expired: int
    """Client requests whose time was over while some of it waited."""


@dataclass(frozen=True)
class AdmissionState:
    """Of one model."""

    lanes: Mapping[Lane, LaneState]
    in_flight_tokens: int
    tokens_per_s: float | None
    """Answered while there was work; None where nothing was yet. Tokens are estimated as for admission."""


class _Waiter(NamedTuple):
    tokens: int
    size: int
    is_granted: asyncio.Future[bool]
    """Its result is whether it goes by the express account."""


class _Lane:
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
        self.places = Places()
        self.tokens = self.bytes = self.requests = self.rejected = self.expired = 0

    def head(self, budget: int) -> tuple[Ticket, _Waiter] | None:
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

    def first_unbegun(self) -> tuple[Ticket, _Waiter] | None:
        """Who came first of those of which nothing was sent yet."""
        while self.unbegun:
            ticket = self.unbegun[0]
            waiter = None if ticket.has_begun else ticket.first()
            if waiter is not None:
                return ticket, waiter
            self.unbegun.popleft()
        return None

    def has_room(self, price: Price, key: Callable[[], Hashable], now: float) -> bool:
        """An empty lane takes anything. Half of it is open to everybody, whatever was promised to others."""
        if not self.requests:
            return True
        tokens = self.tokens + price.tokens
        if tokens > self.most_tokens or self.bytes + price.size > self.most_bytes:
            return False
        if self.places.tokens and self.places.take(key(), now):
            return True
        return tokens + min(self.places.tokens, self.most_tokens // 2) <= self.most_tokens

    def state(self) -> LaneState:
        return LaneState(self.tokens, self.bytes, self.requests, self.rejected, self.expired)


class Ticket:
    """One client request, from when it was let in until it is answered: `with ticket: async with
    ticket.turn(tokens): ...` for each of its server requests.
    """

    def __init__(self, queue: ModelQueue, lane: _Lane, price: Price, budget: int) -> None:
        self._queue = queue
        self._lane = lane
        self._waiters: deque[_Waiter] = deque()
        self._tokens, self._bytes = price
        self.turn_left = budget
        self.is_in_lane = False
        self.has_begun = False
        lane.tokens += price.tokens
        lane.bytes += price.size
        lane.requests += 1

    def turn(self, tokens: int, size: int) -> Turn:
        """Waits until the server has room for a server request, and counts it while it is there."""
        return Turn(self, tokens, size)

    def first(self) -> _Waiter | None:
        """Its next server request that still waits."""
        while self._waiters and self._waiters[0].is_granted.done():
            self._waiters.popleft()
        return self._waiters[0] if self._waiters else None

    async def wait(self, tokens: int, size: int) -> bool:
        """Whether it goes by the express account."""
        waiter = _Waiter(tokens, size, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        if not self.is_in_lane:
            self._queue.join(self, self._lane)
        self._queue.dispatch()
        try:
            return await waiter.is_granted
        except asyncio.CancelledError:
            if waiter.is_granted.cancelled():
                # What stands behind it may be smaller.
                self._queue.dispatch()
            else:
                self._queue.finish(tokens, answered=0, is_express=waiter.is_granted.result())
            raise

    def done(self, tokens: int, *, is_express: bool, is_answered: bool) -> None:
        """A server request of it has left the server."""
        self._queue.finish(tokens, answered=tokens if is_answered else 0, is_express=is_express)

    def grant(self, *, is_express: bool) -> None:
        """Sends the next server request on its way."""
        waiter = self._waiters.popleft()
        self.has_begun = True
        self.turn_left -= waiter.tokens
        self._leave(waiter.tokens, waiter.size)
        waiter.is_granted.set_result(is_express)

    def _leave(self, tokens: int, size: int) -> None:
        self._tokens -= tokens
        self._bytes -= size
        self._lane.tokens -= tokens
        self._lane.bytes -= size
        if not self._tokens:
            self._lane.requests -= 1

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


class ModelQueue:
    """The work of one model."""

    def __init__(self, name: str, budget: int, limits: AdmissionLimits, clock: Callable[[], float]) -> None:
        """`name` is what clients call it, `budget` the tokens of one pass of its encoder."""
        self._name = name
        self._budget = budget
        self._clock = clock
        self._most = limits.in_flight_budgets * budget
        shares = {Lane.INTERACTIVE: limits.interactive_share, Lane.BULK: 1 - limits.interactive_share}
        self._lanes = {
            lane: _Lane(lane, share, limits.max_queued_tokens[lane], limits.max_queued_bytes)
            for lane, share in shares.items()
        }
        self._now_served = 0.0
        self._in_flight = 0
        self._express = 0
        self._throughput = Throughput()

    def enter(self, price: Price, lane: Lane | None, key: Callable[[], Hashable]) -> Ticket:
        """Lets a client request in, as a whole; without a lane its size says which. `key` tells what it asks,
        so that it is known again. Raises TooManyRequests.
        """
        if lane is None:
            lane = Lane.BULK if price.tokens > self._budget else Lane.INTERACTIVE
        chosen = self._lanes[lane]
        if not chosen.has_room(price, key, self._clock()):
            raise self._refusal(chosen, price, key())
        return Ticket(self, chosen, price, self._budget)

    def join(self, ticket: Ticket, lane: _Lane) -> None:
        """Puts a request at the end of its lane. A lane that had no work has not saved up turns."""
        if not lane.tickets:
            lane.clock = max(lane.clock, self._now_served)
        ticket.turn_left = self._budget
        ticket.is_in_lane = True
        lane.tickets.append(ticket)
        if not ticket.has_begun:
            lane.unbegun.append(ticket)

    def dispatch(self) -> None:
        """Sends what there is room for."""
        while self._send_next():
            pass

    def _send_next(self) -> bool:
        heads = [(lane, head) for lane in self._lanes.values() if (head := lane.head(self._budget))]
        if not heads:
            return False
        lane, (ticket, waiter) = min(heads, key=lambda pair: pair[0].clock)
        if not self._in_flight or self._in_flight + waiter.tokens <= self._most:
            self._send(lane, ticket, waiter.tokens, is_express=False)
            return True
        # None overtakes the lane whose turn it is but what is urgent and short, by an account of its own:
        # that holds up the others by no more than the account.
        urgent = self._lanes[Lane.INTERACTIVE]
        if (first := urgent.first_unbegun()) is None:
            return False
        ticket, waiter = first
        if self._express + waiter.tokens > self._most * _EXPRESS_SHARE:
            return False
        self._send(urgent, ticket, waiter.tokens, is_express=True)
        return True

    def _send(self, lane: _Lane, ticket: Ticket, tokens: int, *, is_express: bool) -> None:
        if not self._in_flight + self._express:
            self._throughput.begin(self._clock())
        if is_express:
            self._express += tokens
        else:
            self._in_flight += tokens
        self._now_served = max(self._now_served, lane.clock)
        lane.clock += tokens / lane.share
        ticket.grant(is_express=is_express)

    def finish(self, tokens: int, *, answered: int, is_express: bool) -> None:
        """A server request has left the server, `answered` tokens of it with an answer."""
        if is_express:
            self._express -= tokens
        else:
            self._in_flight -= tokens
        is_full = any(lane.tickets for lane in self._lanes.values())
        self._throughput.note(answered, self._clock(), is_full=is_full)
        self.dispatch()

    def _refusal(self, lane: _Lane, price: Price, key: Hashable) -> TooManyRequests:
        lane.rejected += 1
        rate = self._throughput.tokens_per_s
        wait = _UNKNOWN_WAIT_S
        if rate is not None:
            others = [one for one in self._lanes.values() if one is not lane and one.tokens]
            own = rate * lane.share if others else rate
            wait = lane.places.keep(key, price.tokens, self._clock(), lane.tokens / own, own)
        what, setting = (
            (f"{lane.tokens} tokens", "TOKENS")
            if lane.tokens + price.tokens > lane.most_tokens or lane.bytes + price.size <= lane.most_bytes
            else (f"{lane.bytes} bytes", "BYTES")
        )
        bulk = "BULK_" if lane.lane is Lane.BULK and setting == "TOKENS" else ""
        most = lane.most_tokens if setting == "TOKENS" else lane.most_bytes
        return TooManyRequests(
            f"the model {self._name} is busy: {what} of {lane.lane} requests wait already, at most {most} "
            f"may, and this one has {price.tokens if setting == 'TOKENS' else price.size}; try again in "
            f"{wait:.1f} s (the operator can raise the limit with GATEWAY_MAX_QUEUED_{bulk}{setting})",
            retry_after_s=wait,
        )

    def state(self) -> AdmissionState:
        """For metrics."""
        return AdmissionState(
            {name: lane.state() for name, lane in self._lanes.items()},
            self._in_flight + self._express,
            self._throughput.tokens_per_s,
        )


class Admission:
    """The queues of all models of a gateway process."""

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._queues: dict[str, ModelQueue] = {}

    def queue(self, name: str, served_name: str, budget: int) -> ModelQueue:
        """Of the model whose ensemble has this name."""
        if name not in self._queues:
            self._queues[name] = ModelQueue(served_name, budget, self._limits, self._clock)
        return self._queues[name]

    def states(self) -> dict[str, AdmissionState]:
        """By the ensemble's name, of the models that were asked for something."""
        return {name: queue.state() for name, queue in self._queues.items()}
