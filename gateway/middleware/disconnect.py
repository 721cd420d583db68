"""Ends the work for a client that has gone away: what of it waits leaves the queue, and calls to the server
are cancelled.
"""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.context import current

logger = logging.getLogger(__name__)


# Most requests are answered before that, and need no task that listens.
_GRACE_S = 0.05


class Disconnect:
    """Listens for the client from soon after its body is there until the answer is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        connection = _Connection(receive, send)
        try:
            await self._app(scope, connection.receive, connection.send)
        except asyncio.CancelledError:
            # Whoever stops the gateway may have cancelled the task as well: then it is not ours to go on.
            if not connection.is_cancelled or connection.task.uncancel():
                raise
            context = current()
            logger.info(
                "%s: its client has gone away", "a request" if context is None else context.request_id
            )
        finally:
            connection.close()


class _Connection:
    """One request's two ends, and the task that answers it."""

    def __init__(self, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.is_cancelled = False
        self._receive = receive
        self._send = send
        self._is_answered = False
        self._start: asyncio.TimerHandle | None = None
        self._watch: asyncio.Task[Message] | None = None

    async def receive(self) -> Message:
        """Until the body is there, the server's own; then one task listens, and tells all who ask."""
        if self._start is not None:
            return await asyncio.shield(self._listen())
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._start = asyncio.get_running_loop().call_later(_GRACE_S, self._listen)
        return message

    def _listen(self) -> asyncio.Task[Message]:
        if self._watch is None:
            self._watch = asyncio.create_task(self._wait_for_the_end())
        return self._watch

    async def _wait_for_the_end(self) -> Message:
        message = await self._receive()
        # A server says the same when the answer is complete.
        if message["type"] == "http.disconnect" and not self._is_answered:
            self.is_cancelled = True
            self.task.cancel()
        return message

    async def send(self, message: Message) -> None:
        """Sends a part of the answer, the last of which ends the watch."""
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_answered = True
        await self._send(message)

    def close(self) -> None:
        """Listens no more."""
        if self._start is not None:
            self._start.cancel()
        if self._watch is not None:
            self._watch.cancel()
