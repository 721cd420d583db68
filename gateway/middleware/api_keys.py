"""Lets requests in by their API keys, and tells what is left of their tokens."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.access import Access
from gateway.budget import Budget, Budgets
from gateway.charge import check
from gateway.context import current
from gateway.errors import GatewayError

Refuse = Callable[[Request, GatewayError], Awaitable[Response]]
"""An error -> its answer in the dialect of the request."""


class ApiKeys:
    """Goes inside of RequestId, which makes the context that it fills."""

    def __init__(self, app: ASGIApp, access: Access, refuse: Refuse) -> None:
        self._app = app
        self._access = access
        self._refuse = refuse
        self._budgets = Budgets()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = current()
        if scope["type"] != "http" or context is None:
            await self._app(scope, receive, send)
            return
        try:
            key = self._access.admit(scope["method"], scope["path"], keys_of(Headers(scope=scope)))
            budget = None
            if key is not None:
                context.key_name, context.models, context.lane = key.name, key.models, key.lane
                if key.tokens_per_minute is not None:
                    context.budget = budget = self._budgets.of(key.name, key.tokens_per_minute)
                    # Once more when its size is known: others may have come in while its body was read.
                    check(context)
        except GatewayError as error:
            response = await self._refuse(Request(scope), error)
            await response(scope, receive, send)
            return
        if budget is not None:
            send = _telling(budget, send)
        await self._app(scope, receive, send)


def _telling(budget: Budget, send: Send) -> Send:
    """Says with the answer what is left."""

    async def send_told(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-ratelimit-limit-tokens"] = str(budget.tokens_per_minute)
            headers["x-ratelimit-remaining-tokens"] = str(max(0, int(budget.level())))
        await send(message)

    return send_told


def keys_of(headers: Headers) -> list[str]:
    """The keys that a request brings, wherever clients put them; nobody sends more than a few."""
    given = []
    for value in headers.getlist("authorization"):
        scheme, _, rest = value.strip().partition(" ")
        given.append(rest.strip() if scheme.lower() == "bearer" else value.strip())
    for name in ("api-key", "x-api-key"):
        given += [value.strip() for value in headers.getlist(name)]
    return [key for key in given if key][:8]
