"""How urgent a request is and how long it may take, as its headers and its body say it in all dialects.

Of several that say it the least urgent and the shortest win: a key that is for bulk work stays so.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.context import Lane, RequestContext, current
from gateway.errors import BadRequest, TimedOut, shorten

PRIORITY = "priority"
PRIORITY_HEADER = "x-priority"
TIMEOUT = "timeout"
TIMEOUT_HEADER = "x-request-timeout"


def read_headers(headers: Mapping[str, str]) -> None:
    """Into the context of the request that runs. Raises BadRequest."""
    context = current()
    if context is None:
        return
    if (priority := headers.get(PRIORITY_HEADER)) is not None:
        _ask_lane(context, priority.strip().lower(), f"the header {PRIORITY_HEADER}", PRIORITY_HEADER)
    if (timeout := headers.get(TIMEOUT_HEADER)) is not None:
        try:
            seconds: Any = float(timeout)
        except ValueError:
            seconds = timeout
        _ask_timeout(context, seconds, f"the header {TIMEOUT_HEADER}", TIMEOUT_HEADER)


def read_fields(body: Mapping[str, Any]) -> None:
    """The same of a JSON body. Raises BadRequest."""
    context = current()
    if context is None:
        return
    if (priority := body.get(PRIORITY)) is not None:
        _ask_lane(context, priority, PRIORITY, PRIORITY)
    if (timeout := body.get(TIMEOUT)) is not None:
        _ask_timeout(context, timeout, TIMEOUT, TIMEOUT)


def _ask_lane(context: RequestContext, value: Any, name: str, param: str) -> None:
    if isinstance(value, int) and not isinstance(value, bool):
        # vLLM's numbers, of which its clients send 0 without meaning anything by it.
        lane = None if value == 0 else Lane.BULK if value > 0 else Lane.INTERACTIVE
    elif isinstance(value, str) and value in set(Lane):
        lane = Lane(value)
    else:
        raise BadRequest(
            f"{name} is {shorten(value)}; it takes interactive or bulk, or as vLLM a whole number, of which "
            "those above 0 are bulk and those below 0 interactive",
            param=param,
        )
    if lane is not None and context.lane is not Lane.BULK:
        context.lane = lane


def _ask_timeout(context: RequestContext, value: Any, name: str, param: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not value > 0 or not math.isfinite(value):
        raise BadRequest(
            f"{name} is {shorten(value)}; it takes the seconds that an answer may take, a number above 0",
            param=param,
        )
    deadline = context.received_at + value
    if context.deadline is None or deadline < context.deadline:
        context.deadline = deadline
        context.time_limit = f"{value:g} s, its {name.removeprefix('the ')}"


@dataclass(frozen=True)
class TimeLimit:
    """Until when an answer is of use."""

    deadline: float
    """time.monotonic()."""
    own: str
    """What of the request set it; empty where it is the operator's."""
    default_s: float

    @property
    def deadline_ms(self) -> int:
        """Milliseconds since 1970."""
        return int((time.time() + self.deadline - time.monotonic()) * 1000)

    def error(self, subject: str) -> TimedOut:
        """What the client is told when it passes."""
        if self.own:
            limit = f"{self.own}; give it more time, or send fewer or shorter inputs"
        else:
            limit = (
                f"{self.default_s:g} s; send fewer or shorter inputs (the operator can raise the limit with "
                "GATEWAY_REQUEST_TIMEOUT_S)"
            )
        return TimedOut(f"{subject} did not answer within {limit}")

    @contextlib.asynccontextmanager
    async def watch(self, subject: str) -> AsyncIterator[None]:
        """Ends what runs within when the time is over. Raises TimedOut."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise self.error(subject)
        try:
            async with asyncio.timeout(left):
                yield
        except TimeoutError:
            raise self.error(subject) from None


def time_limit(default_s: float) -> TimeLimit | None:
    """Of the request that runs, `default_s` at most; None outside of one."""
    context = current()
    if context is None:
        return None
    deadline = context.received_at + default_s
    if context.deadline is not None and context.deadline < deadline:
        return TimeLimit(context.deadline, context.time_limit, default_s)
    return TimeLimit(deadline, "", default_s)
