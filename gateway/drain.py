"""The end of a gateway that fails nobody: requests under way are answered, and at last refused.

/ready says at once that the gateway stops. A connection that is open may bring one request more: it is
answered like any other, and its answer closes the connection. A 503 there would be a failure that the client
did nothing to earn, and it would have to come back anyway.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import Unavailable


class Drain:
    """What one process knows of its end."""

    def __init__(self) -> None:
        self.has_begun = False
        self._is_over = False
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """From now on answers close their connections."""
        self.has_begun = True

    def end(self) -> None:
        """Requests whose answers have not begun get 503."""
        self._is_over = True
        for task in self._tasks:
            task.cancel()

    def is_refused(self, task: asyncio.Task[None]) -> bool:
        """Whether a request was ended by this, and not by its client."""
        return self._is_over and task in self._tasks

    def enter(self, task: asyncio.Task[None]) -> None:
        """A request begins; one that comes after the end is refused, too."""
        self._tasks.add(task)
        if self._is_over:
            task.cancel()

    def leave(self, task: asyncio.Task[None]) -> None:
        """Its answer has begun, or nobody waits for it any more."""
        self._tasks.discard(task)


class Draining:
    """The middleware."""

    def __init__(
        self,
        app: ASGIApp,
        drain: Drain,
        answer: Callable[[Request, Exception], Awaitable[Response]],
    ) -> None:
        """`answer` tells an error the way that the request's dialect does."""
        self._app = app
        self._drain = drain
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        task = asyncio.current_task()
        assert task is not None

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._drain.leave(task)
                if self._drain.has_begun:
                    MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        self._drain.enter(task)
        try:
            await self._app(scope, receive, send_and_close)
        except asyncio.CancelledError:
            # Whoever stops the process may have cancelled the task as well.
            if not self._drain.is_refused(task) or task.uncancel():
                raise
            fault = Unavailable("the gateway is stopping, and the answer was not ready in time; try again")
            response = await self._answer(Request(scope, receive), fault)
            await response(scope, receive, send_and_close)
        finally:
            self._drain.leave(task)
