"""Sees every request go by: numbers for /metrics, a Server-Timing header, its span, and a line in the log
where that is wanted.
"""

from __future__ import annotations

import logging
import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import tracing
from gateway.context import current
from gateway.metrics import OTHER_ROUTE, count_request
from gateway.phases import SERIALISE, header

logger = logging.getLogger("gateway.access")
# nginx' status of a client that has left.
_CLIENT_LEFT = 499


class Observation:
    """Stands right inside RequestId, so that it sees what other middleware refuses, too."""

    def __init__(self, app: ASGIApp, *, has_access_log: bool) -> None:
        self._app = app
        self._has_access_log = has_access_log
        if has_access_log:
            # Whoever asks for it gets it, whatever GATEWAY_LOG_LEVEL says.
            logger.setLevel(logging.INFO)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = current()
        if scope["type"] != "http" or context is None:
            await self._app(scope, receive, send)
            return
        tracing.begin(context)
        status = _CLIENT_LEFT

        async def send_timed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                now = time.monotonic()
                if context.answered_at is not None:
                    context.phases[SERIALISE] = now - context.answered_at
                timing = header(context.phases, now - context.received_at)
                MutableHeaders(scope=message)["Server-Timing"] = timing
                # The span is over when the answer is.
                tracing.describe(context)
            await send(message)

        try:
            await self._app(scope, receive, send_timed)
        except Exception:
            # Answered outside of all middleware.
            status = 500
            raise
        finally:
            seconds = time.monotonic() - context.received_at
            count_request(context, status, seconds)
            if self._has_access_log:
                route = context.route or OTHER_ROUTE
                logger.info(
                    "%s %s %d %.1f ms",
                    scope["method"],
                    route,
                    status,
                    1000 * seconds,
                    extra={"status": status, "duration_ms": round(1000 * seconds, 3)},
                )
