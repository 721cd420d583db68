"""Which work is sent to a server next. Work is priced in tokens; each server of a model has a bounded number
of them, the rest waits here, in a lane for what is urgent and one for bulk, and more than a bound is refused.

A client request gives up its turn after one token budget of its server requests, so that none waits for the
whole of another. Both lanes advance by their shares where both have work. All of it is of one gateway
process.

*Source:* the order of the lanes is start-time fair queueing (Goyal, Vin and Cheng, 1996), that within a lane
deficit round robin (Shreedhar and Varghese, 1995).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from gateway.context import Lane
from gateway.errors import TooManyRequests
from gateway.lane import LaneQueue, LaneState, Price, Ticket
from gateway.throughput import Throughput

# What an urgent request may have at the server beside a full measure of other work, as part of that measure.
_EXPRESS_SHARE = 0.25
# Before anything was answered nobody knows how long it takes.
_UNKNOWN_WAIT_S = 1.0


@dataclass(frozen=True)
class AdmissionLimits:
    """What an operator may set, for each model and each process of the gateway."""

    in_flight_budgets: float = 2.0
    """Token budgets of the pipeline that each server has at once."""
    interactive_share: float = 0.75
    """Of the tokens, where both lanes have work."""
    max_queued_tokens: Mapping[Lane, int] = field(
        default_factory=lambda: {Lane.INTERACTIVE: 250_000, Lane.BULK: 2_000_000}
    )
    max_queued_bytes: int = 256 * 2**20
    """Of texts and images that wait, in each lane."""


@dataclass(frozen=True)
class AdmissionState:
    """Of one model."""

    model: str
    """What clients call it."""
    lanes: Mapping[Lane, LaneState]
    in_flight_tokens: int
    tokens_per_s: float | None
    """Answered while there was work; None where nothing was yet. Tokens are estimated as for admission."""


class ModelQueue:
    """The work of one model."""

    budget: int
    """Tokens of one pass of its encoder."""
    servers: int
    """That answer for it."""

    def __init__(self, name: str, limits: AdmissionLimits, clock: Callable[[], float]) -> None:
        """`name` is what clients call it."""
        self._name = name
        self._clock = clock
        self._budgets = limits.in_flight_budgets
        shares = {Lane.INTERACTIVE: limits.interactive_share, Lane.BULK: 1 - limits.interactive_share}
        self._lanes = {
            lane: LaneQueue(lane, share, limits.max_queued_tokens[lane], limits.max_queued_bytes)
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
            lane = Lane.BULK if price.tokens > self.budget else Lane.INTERACTIVE
        chosen = self._lanes[lane]
        now, rate = self._clock(), self._rate(chosen)
        if not chosen.has_room(price, key, now, rate):
            raise self._refusal(chosen, price, key(), now, rate)
        return Ticket(self, chosen, price, self.budget)

    def join(self, ticket: Ticket, lane: LaneQueue) -> None:
        """Puts a request at the end of its lane. A lane that had no work has not saved up turns."""
        if not lane.tickets:
            lane.clock = max(lane.clock, self._now_served)
        lane.join(ticket, self.budget)

    def dispatch(self) -> None:
        """Sends what there is room for."""
        while self._send_next():
            pass

    def _send_next(self) -> bool:
        heads = [(lane, head) for lane in self._lanes.values() if (head := lane.head(self.budget))]
        if not heads:
            return False
        most = self._budgets * self.budget * self.servers
        lane, (ticket, waiter) = min(heads, key=lambda pair: pair[0].clock)
        if not self._in_flight or self._in_flight + waiter.tokens <= most:
            self._send(lane, ticket, waiter.tokens, is_express=False)
            return True
        # None overtakes the lane whose turn it is but what is urgent and short, by an account of its own:
        # that holds up the others by no more than the account.
        urgent = self._lanes[Lane.INTERACTIVE]
        if (first := urgent.first_unbegun()) is None:
            return False
        ticket, waiter = first
        if self._express + waiter.tokens > most * _EXPRESS_SHARE:
            return False
        self._send(urgent, ticket, waiter.tokens, is_express=True)
        return True

    def _send(self, lane: LaneQueue, ticket: Ticket, tokens: int, *, is_express: bool) -> None:
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

    def _rate(self, lane: LaneQueue) -> float | None:
        """Tokens a second that a lane advances by; None before anything was answered.

        What urgent requests are told must also hold when bulk work comes meanwhile. The other way round it
        would be told four times too long.
        """
        rate = self._throughput.tokens_per_s
        is_shared = lane.lane is Lane.INTERACTIVE or self._lanes[Lane.INTERACTIVE].tokens > 0
        return rate * lane.share if rate is not None and is_shared else rate

    def _refusal(
        self, lane: LaneQueue, price: Price, key: Hashable, now: float, rate: float | None
    ) -> TooManyRequests:
        lane.rejected += 1
        kept, wait = 0, _UNKNOWN_WAIT_S
        if rate is not None:
            kept = lane.promised(now, rate)
            wait = lane.keep_place(price, key, now, rate)
        return TooManyRequests(
            f"the model {self._name} is busy: {_explain(lane, price, kept)}; try again in {wait:.1f} s",
            retry_after_s=wait,
        )

    def state(self) -> AdmissionState:
        """For metrics."""
        return AdmissionState(
            self._name,
            {name: lane.state() for name, lane in self._lanes.items()},
            self._in_flight + self._express,
            self._throughput.tokens_per_s,
        )


def _explain(lane: LaneQueue, price: Price, kept: int) -> str:
    """Why a lane has no room for a request, and what an operator can do about it."""
    bulk = "BULK_" if lane.lane is Lane.BULK else ""
    name = f"GATEWAY_MAX_QUEUED_{bulk}TOKENS"
    own, waiting, most, unit = price.tokens, lane.charged, lane.most_tokens, "tokens"
    if lane.lacks_bytes(price):
        own, waiting, most, unit = price.size, lane.bytes, lane.most_bytes, "bytes"
        name, kept = "GATEWAY_MAX_QUEUED_BYTES", 0
    promised = f", room for {kept} is kept for those who were told to come back" if kept else ""
    return (
        f"{waiting} {unit} of {lane.lane} requests wait already{promised}, at most {most} may, and this one "
        f"has {own} (the operator can raise the limit with {name})"
    )


class Admission:
    """The queues of all models of a gateway process."""

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._queues: dict[str, ModelQueue] = {}

    def queue(self, name: str, served_name: str, budget: int, servers: int = 1) -> ModelQueue:
        """Of the model whose ensemble has this name, and that so many servers answer for at the moment."""
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = ModelQueue(served_name, self._limits, self._clock)
        # A model may come back with another.
        queue.budget = budget
        queue.servers = servers
        return queue

    def states(self) -> dict[str, AdmissionState]:
        """By the ensemble's name, of the models that were asked for something."""
        return {name: queue.state() for name, queue in self._queues.items()}
