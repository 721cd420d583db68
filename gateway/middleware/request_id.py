"""Gives every request its context, which ends with it, and its id, which answers carry: the client's own
`x-request-id`, or a new one.
"""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.context import RequestContext, enter

HEADER = "x-request-id"
# What may stand in a log's line and in a header as it is.
_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class RequestId:
    """The outermost middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        context = RequestContext(request_id, scope=scope)
        enter(context)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            context.end()
