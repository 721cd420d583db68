"""Puts the gateway together: services, dialects, errors."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from gateway import byte_budget, tracing
from gateway.access import Access
from gateway.context import current
from gateway.drain import Drain, Draining
from gateway.endpoints import ADMIN, DEFAULT_DIALECT, DIALECTS
from gateway.endpoints.dialect import style_of
from gateway.error_bodies import ErrorStyle
from gateway.errors import BadRequest, GatewayError, ServerFault, Unauthorized
from gateway.inference import Inference
from gateway.lifespan import serving
from gateway.middleware.api_keys import ApiKeys
from gateway.middleware.cors import cors
from gateway.middleware.disconnect import Disconnect
from gateway.middleware.observation import Observation
from gateway.middleware.pieces import Pieces
from gateway.middleware.refusals import Refusals
from gateway.middleware.request_id import HEADER, RequestId
from gateway.middleware.slow_bodies import SlowBodies
from gateway.settings import Settings
from gateway.wire import respond

logger = logging.getLogger(__name__)

_VERSION = importlib.metadata.version("triton-embeddings")
_DESCRIPTION = (
    "Embedding models on NVIDIA Triton Inference Server. Point an OpenAI client's base_url at /v1; "
)
_WITHOUT_KEYS = "no API key is needed."
_WITH_KEYS = "an API key is asked for, as Authorization: Bearer KEY, api-key or x-api-key."


def create_app(settings: Settings, inference: Inference | None = None) -> FastAPI:
    """The application.

    Tests give an inference of their own; else the server that the settings name is used.

    Raises UnusableKeys.
    """
    access = Access(settings)
    drain = Drain()
    spans = tracing.make_provider(settings.traces_url) if settings.traces_url else None
    # FastAPI's own /docs is blank on a machine without the internet: it takes its scripts from a CDN.
    app = FastAPIOffline(
        title="triton-embeddings",
        description=_DESCRIPTION + (_WITH_KEYS if access.asks_for_keys else _WITHOUT_KEYS),
        version=_VERSION,
        redoc_url=None,
        lifespan=functools.partial(
            serving, settings, drain, inference, None if spans is None else spans.shutdown
        ),
        telemetry=tracing.fastapi_options(spans),
    )
    app.state.body_budget = byte_budget.bodies(settings.max_body_bytes_total)
    for name, dialect in DIALECTS.items():
        if name != ADMIN or settings.admin_key is not None:
            app.include_router(dialect.router, tags=[name])
    if access.asks_for_keys:
        _describe_keys(app)
    # The last one added is the first that a request passes.
    app.add_middleware(Disconnect)
    app.add_middleware(
        SlowBodies,
        timeout_s=settings.body_timeout_s,
        min_bytes_per_s=settings.min_bytes_per_s,
        window_s=settings.progress_window_s,
    )
    app.add_middleware(ApiKeys, access=access, refuse=_answer_refusal)
    app.add_middleware(Refusals, refuse=_answer_refusal)
    app.add_middleware(Draining, drain, _answer_refusal)
    if settings.cors_origins:
        app.add_middleware(cors, origins=settings.cors_origins)
    app.add_middleware(Observation, has_access_log=settings.access_log)
    app.add_middleware(Pieces, timeout_s=settings.body_timeout_s)
    app.add_middleware(RequestId)
    app.add_exception_handler(GatewayError, _answer_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_unknown)
    return app


def _describe_keys(app: FastAPI) -> None:
    """Lets /docs ask for a key, and send it."""
    build = app.openapi

    def openapi() -> dict[str, Any]:
        document = build()
        schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["API key"] = {"type": "http", "scheme": "bearer"}
        document["security"] = [{"API key": []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    return _respond(request, error, _style(request).status(error))


async def _answer_refusal(request: Request, error: Exception) -> Response:
    """What middleware refuses has not come to the router, which alone knows its route; what is counted and
    logged should name it.
    """
    if "route" not in request.scope:
        routes = (route for dialect in DIALECTS.values() for route in dialect.router.routes)
        request.scope["route"] = next((r for r in routes if r.matches(request.scope)[0] is Match.FULL), None)
    return await _answer_error(request, error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Routes that do not exist, and methods that a route does not have."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    allowed = (error.headers or {}).get("Allow")
    if error.status_code == 405 and allowed:
        fault = BadRequest(f"{what} does not exist here, but {allowed} does", code="method_not_allowed")
    elif error.status_code == 404:
        fault = BadRequest(f"{what} does not exist here; /docs lists what does", code="not_found")
    else:
        fault = BadRequest(str(error.detail))
    return _respond(request, fault, error.status_code, error.headers)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """A client that left while it was still sending: nothing is wrong here, and nobody reads this."""
    return Response(status_code=499)


async def _answer_unknown(request: Request, error: Exception) -> Response:
    logger.error("unexpected error", exc_info=error)
    fault = ServerFault("an unexpected error; the gateway's log tells what it was")
    return _respond(request, fault, _style(request).status(fault))


def _respond(
    request: Request,
    error: GatewayError,
    status: int,
    headers: Mapping[str, str] | None = None,
) -> Response:
    extra = dict(headers or {})
    if (context := current()) is not None:
        # What fails unexpectedly is answered outside of all middleware.
        extra[HEADER] = context.request_id
    if error.retry_after_s is not None:
        extra["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        extra["retry-after-ms"] = str(max(1, math.ceil(error.retry_after_s * 1000)))
        extra["x-should-retry"] = "true"
    if isinstance(error, Unauthorized):
        extra["WWW-Authenticate"] = "Bearer"
    return respond(_style(request).render(error), status, extra)


def _style(request: Request) -> ErrorStyle:
    """How the dialect tells of errors that the request speaks, or that has its path, whatever the method."""
    chosen: ErrorStyle | None = getattr(request.state, "error_style", None)
    if chosen is not None:
        return chosen
    for dialect in DIALECTS.values():
        for route in dialect.router.routes:
            if route.matches(request.scope)[0] is not Match.NONE:
                return style_of(getattr(route, "endpoint", None)) or dialect.errors
    return DEFAULT_DIALECT.errors
