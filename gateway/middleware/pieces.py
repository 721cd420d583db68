"""Hands large answers to the connection piece by piece, so that it is known whether the client takes them.

A whole would lie in the connection's own buffers, which over TLS nobody can look into: an answer would seem
sent, and uvicorn's timer of idle connections end it half way to a client on a slow line.
"""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.connection import CONNECTION, GuardedProtocol
from gateway.context import current

logger = logging.getLogger(__name__)

_PIECE = 256 * 2**10


class Pieces:
    """Stands right inside RequestId: nobody else sees that there are pieces."""

    def __init__(self, app: ASGIApp, timeout_s: float) -> None:
        """A client that has not taken all of a large answer `timeout_s` after its first byte is cut off."""
        self._app = app
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_pieces(message: Message) -> None:
            body = message.get("body", b"")
            if len(body) <= _PIECE:
                await send(message)
                return
            more = message.get("more_body", False)
            connection: GuardedProtocol | None = scope.get("state", {}).get(CONNECTION)
            try:
                async with asyncio.timeout(self._timeout_s):
                    for start in range(0, len(body), _PIECE):
                        piece = body[start : start + _PIECE]
                        await send(
                            {**message, "body": piece, "more_body": more or start + _PIECE < len(body)}
                        )
                        if connection is not None:
                            connection.piece_taken()
            except TimeoutError:
                context = current()
                logger.info(
                    "%s: its client has not taken the answer in %g s and is cut off",
                    "a request" if context is None else context.request_id,
                    self._timeout_s,
                )
                if connection is not None:
                    connection.cut_off()

        await self._app(scope, receive, send_in_pieces if scope["type"] == "http" else send)
