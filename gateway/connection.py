"""HTTP connections that do not trust who is at the other end: uvicorn's protocol, and what it lacks.

uvicorn 0.54 with httptools has no limit for headers, and no time limit but that of idle connections: a client
that sends a byte now and then, or that does not read its answer, would hold a connection and its memory for
ever. What is wrong with a request whose headers are complete is told by the application, in the request's own
dialect (`middleware/refusals.py`); who has not got that far is cut off.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.errors import GatewayError, HeadersTooLarge, Unavailable
from gateway.settings import Settings

LIMITS = "connection_limits"
"""The name of a ConnectionLimits in the application's lifespan state."""
REFUSAL = "refusal"
"""The name, in the state of a request, of what is wrong with it before it is looked at."""
CONNECTION = "connection"
"""The name, in the state of a request, of its GuardedProtocol."""

_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
# Connections beyond the limit that are told so. Those beyond these are closed without a word.
_SPARE_CONNECTIONS = 64
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%s"
)


@dataclass(frozen=True)
class ConnectionLimits:
    """What a connection may do."""

    max_connections: int
    max_headers: int
    max_header_bytes: int
    header_timeout_s: float
    min_bytes_per_s: int
    progress_window_s: float

    @classmethod
    def of(cls, settings: Settings) -> ConnectionLimits:
        """Those that an operator has set."""
        return cls(
            settings.max_connections,
            settings.max_headers,
            settings.max_header_bytes,
            settings.header_timeout_s,
            settings.min_bytes_per_s,
            settings.progress_window_s,
        )


class GuardedProtocol(HttpToolsProtocol):
    """One connection. Times are those of the event loop; one timer looks at all connections."""

    limits: ConnectionLimits
    _is_beyond = False
    """Whether there were too many connections when it came."""
    _head_since: float | None = None
    """When the headers that are not complete began."""
    _head_bytes = 0
    _body_since: float | None = None
    """When a body began that nobody waits for any more: its request is answered."""
    _unsent = 0
    """Bytes of answers that the client had not taken at the start of the window."""
    _window_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.limits = self.app_state[LIMITS]
        self._head_since = self.loop.time()
        excess = len(self.connections) - self.limits.max_connections
        self._is_beyond = excess > 0
        if excess > _SPARE_CONNECTIONS:
            transport.abort()
        _watch(self)

    def data_received(self, data: bytes) -> None:
        is_new = self._head_since is None and (self.cycle is None or not self.cycle.more_body)
        if is_new:
            self._head_since, self._head_bytes = self.loop.time(), 0
        if self._head_since is not None and _UPGRADE.search(data, 0, self.limits.max_header_bytes):
            data = _without_upgrade(data)
        super().data_received(data)
        if self._head_since is not None:
            self._head_bytes += len(data)
            if self._head_bytes > self.limits.max_header_bytes and not self.transport.is_closing():
                told = str(_too_large(self.limits)).encode()
                self.transport.write(_TOO_LARGE % (len(told), told))
                self.transport.close()

    def on_headers_complete(self) -> None:
        self._head_since = None
        self.scope["state"][CONNECTION] = self
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        refusal: GatewayError | None = None
        if size > self.limits.max_header_bytes:
            refusal = _too_large(self.limits)
        elif len(self.headers) > self.limits.max_headers:
            refusal = HeadersTooLarge(
                f"the request has {len(self.headers)} header fields; at most {self.limits.max_headers} are "
                "taken (the operator can raise the limit with GATEWAY_MAX_HEADERS)"
            )
        elif self._is_beyond:
            refusal = Unavailable(
                f"more than {self.limits.max_connections} connections are open; try again in a while (the "
                "operator can raise the limit with GATEWAY_MAX_CONNECTIONS)"
            )
        if refusal is not None:
            self.scope["state"][REFUSAL] = refusal
        super().on_headers_complete()

    def piece_taken(self) -> None:
        """Another piece of a large answer was written, for which there is only room when most of those before
        it are on their way.
        """
        self._unsent = 0

    def cut_off(self) -> None:
        """At once, with all that waits to be sent."""
        self.transport.abort()

    def is_overdue(self, now: float) -> bool:
        """Whether the other end keeps this connection for nothing."""
        limits = self.limits
        if self._head_since is not None and now - self._head_since > limits.header_timeout_s:
            # Of an idle connection uvicorn's own timer knows.
            return True
        if self.cycle is not None and self.cycle.response_complete and self.cycle.more_body:
            if self._body_since is None:
                self._body_since = now
            elif now - self._body_since > limits.progress_window_s:
                return True
        else:
            self._body_since = None
        return self._reads_too_slowly(now)

    def _reads_too_slowly(self, now: float) -> bool:
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or self._unsent == 0 or unsent > self._unsent:
            # Nothing waits, or there is more to read since.
            self._unsent, self._window_since = unsent, now
            return False
        if now - self._window_since < self.limits.progress_window_s:
            return False
        taken = self._unsent - unsent
        is_slow = taken < self.limits.min_bytes_per_s * (now - self._window_since)
        self._unsent, self._window_since = unsent, now
        return is_slow


def _without_upgrade(data: bytes) -> bytes:
    """Java's client offers HTTP/2 with every request. A server may pass over that, but httptools 0.9 passes
    over the body then, too.
    """
    head, end, body = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"\r\nx-upgrade:", head) + end + body


def _too_large(limits: ConnectionLimits) -> HeadersTooLarge:
    return HeadersTooLarge(
        f"the headers of the request have more than {limits.max_header_bytes} bytes (the operator can raise "
        "the limit with GATEWAY_MAX_HEADER_BYTES)"
    )


def _watch(protocol: GuardedProtocol) -> None:
    """Starts the timer of all connections, where it does not run: none of them pays for one of its own."""
    state: Any = protocol.server_state
    if getattr(state, "is_watched", False):
        return
    loop, limits = protocol.loop, protocol.limits
    interval_s = min(1.0, limits.header_timeout_s / 4, limits.progress_window_s / 4)

    def look() -> None:
        now = loop.time()
        for one in list(state.connections):
            if one.is_overdue(now):
                # What is buffered for a client that does not read would never go.
                one.transport.abort()
        if state.connections:
            loop.call_later(interval_s, look)
        else:
            state.is_watched = False

    state.is_watched = True
    loop.call_later(interval_s, look)
