"""Answers requests that the connection has found too large, or one too many, in their dialect's own words."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.access import Door, door_of
from gateway.connection import REFUSAL
from gateway.errors import Unavailable
from gateway.middleware.api_keys import Refuse


class Refusals:
    """Goes outside of whatever costs anything."""

    def __init__(self, app: ASGIApp, refuse: Refuse) -> None:
        self._app = app
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = scope.get("state", {}).get(REFUSAL)
        # Probes are answered however many clients there are: a busy gateway is no dead one.
        if error is None or (
            isinstance(error, Unavailable) and door_of(scope["method"], scope["path"]) is Door.OPEN
        ):
            await self._app(scope, receive, send)
            return

        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        response = await self._refuse(Request(scope), error)
        await response(scope, receive, send_last)
