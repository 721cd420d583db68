"""Refuses bodies that do not come, or come too slowly."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import SlowClient


class SlowBodies:
    """Raises SlowClient from the endpoint's own read. Only waiting for the client counts: what the gateway
    does not read by itself, because it is busy, does not come either.
    """

    def __init__(self, app: ASGIApp, timeout_s: float, min_bytes_per_s: int, window_s: float) -> None:
        self._app = app
        self._timeout_s = timeout_s
        self._min_bytes_per_s = min_bytes_per_s
        self._window_s = window_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, self._timeout_s, self._min_bytes_per_s, self._window_s)

        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start" and body.is_late:
                # The rest of the body is still to come, if it comes at all.
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self._app(scope, body.receive, send_last)


class _Body:
    """The body of one request."""

    def __init__(self, receive: Receive, timeout_s: float, min_bytes_per_s: int, window_s: float) -> None:
        self._receive = receive
        self._timeout_s = timeout_s
        self._min_bytes_per_s = min_bytes_per_s
        self._window_s = window_s
        self._is_complete = False
        self._waited_s = 0.0
        self._waited_in_window_s = 0.0
        self._bytes_in_window = 0
        self.is_late = False

    async def receive(self) -> Message:
        if self._is_complete:
            # Whoever listens for a client that leaves may do so as long as it takes.
            return await self._receive()
        loop = asyncio.get_running_loop()
        message: Message | None = None
        while message is None:
            begin = loop.time()
            left_s = min(self._timeout_s - self._waited_s, self._window_s - self._waited_in_window_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(left_s, 0.0)):
                    message = await self._receive()
            if message is not None and (
                message["type"] != "http.request" or not message.get("more_body", False)
            ):
                self._is_complete = True
            else:
                self._count(loop.time() - begin, len(message.get("body", b"")) if message else 0)
        return message

    def _count(self, waited_s: float, n_bytes: int) -> None:
        """Raises SlowClient."""
        self._waited_s += waited_s
        self._waited_in_window_s += waited_s
        self._bytes_in_window += n_bytes
        if self._waited_s >= self._timeout_s:
            self.is_late = True
            raise SlowClient(
                f"the body was not there within {self._timeout_s:g} s; send fewer inputs at a time (the "
                "operator can wait longer with GATEWAY_BODY_TIMEOUT_S)",
                code="slow_body",
            )
        if self._waited_in_window_s < self._window_s:
            return
        if self._bytes_in_window < self._min_bytes_per_s * self._waited_in_window_s:
            self.is_late = True
            raise SlowClient(
                f"only {self._bytes_in_window} bytes of the body came in {self._waited_in_window_s:.1f} s; "
                f"at least {self._min_bytes_per_s} a second are waited for (the operator can lower that with "
                "GATEWAY_MIN_BYTES_PER_S)",
                code="slow_body",
            )
        self._waited_in_window_s = 0.0
        self._bytes_in_window = 0
