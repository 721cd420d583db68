"""What is known of the HTTP request that runs: its name in logs, who asks, how urgent it is, and until when.

It belongs to the task that answers the request, and to those that this one starts, so that nothing has to
hand it down.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol


class Lane(StrEnum):
    """How urgent a request is."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


@dataclass(frozen=True)
class ServerRequest:
    """One that the inference server has answered."""

    ended: float
    """time.monotonic()."""
    phases: Mapping[str, float]


class Held(Protocol):
    """Bytes of its answer; `gateway/byte_budget.py` has it."""

    def add(self, n_bytes: int) -> None: ...
    def check(self, more: int = 0) -> None: ...
    def close(self) -> None: ...


class TokenBudget(Protocol):
    """What a key may have computed; `gateway/budget.py` has it."""

    tokens_per_minute: int

    def charge(self, n_tokens: int) -> None: ...
    def wait_s(self) -> float: ...


@dataclass
class RequestContext:
    """Of one HTTP request."""

    request_id: str
    received_at: float = field(default_factory=time.monotonic)
    """time.monotonic() of its first byte."""
    lane: Lane | None = None
    """None leaves it to the request's size."""
    lane_taken: Lane | None = None
    """The one that it waited in last; None where it was in none."""
    deadline: float | None = None
    """time.monotonic() after which nobody wants an answer."""
    time_limit: str = ""
    """What set the deadline, in words."""
    key_name: str | None = None
    """Of the API key that it came with; None where none is asked for."""
    budget: TokenBudget | None = None
    """Of the key's tokens; None where it has no limit."""
    is_charged: bool = False
    """Whether something of it was taken out of that: it is let in, and is not refused half way."""
    models: frozenset[str] | None = None
    """Names of the models that it may use; None is all."""
    n_tokens: int = 0
    """Tokens that were computed for it, as far as its answer accounts for them."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds that each phase took, as far as it is known by now; `gateway/phases.py` has their names."""
    scope: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """ASGI's description of the request."""
    model: str = ""
    """The one that was asked, by the name that clients use; empty where none was."""
    traceparent: str = ""
    """W3C's name of the trace and the span that the request is; empty where it is not traced."""
    answered_at: float | None = None
    """time.monotonic() of the last answer of a model, put together."""
    last_server_request: ServerRequest | None = None
    answer: Held | None = None
    """What is held of its answer; None before the server gave some."""

    def charge(self, n_tokens: int) -> None:
        """Takes so many out of the budget of its key, or puts them back where they are negative."""
        if self.budget is not None:
            self.is_charged = True
            self.budget.charge(n_tokens)

    def end(self) -> None:
        """Its answer is sent, or nobody waits for it any more."""
        if self.answer is not None:
            self.answer.close()

    @property
    def route(self) -> str:
        """The template of the path that it took, not the path; empty where it took none that is known."""
        return getattr(self.scope.get("route"), "path", "")


_current: ContextVar[RequestContext | None] = ContextVar("request_context", default=None)


def current() -> RequestContext | None:
    """Of the request that runs; None outside of one, as in a canary."""
    return _current.get()


def count_tokens(n_tokens: int) -> None:
    """Tells what the request that runs has cost."""
    if (context := current()) is not None:
        context.n_tokens += n_tokens
        context.charge(n_tokens)


def enter(context: RequestContext) -> None:
    """Makes it the one of this task, and of those that it starts from now on."""
    _current.set(context)
