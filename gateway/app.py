"""Puts the gateway together: services, dialects, errors."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.metadata
import logging
import math
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from gateway import gauges, tracing
from gateway.access import Access
from gateway.body_budget import BodyBudget
from gateway.catalog import Catalog
from gateway.connection import LIMITS, ConnectionLimits
from gateway.context import current
from gateway.drain import Drain, Draining
from gateway.endpoints import ADMIN, DEFAULT_DIALECT, DIALECTS
from gateway.endpoints.dialect import Services, style_of
from gateway.error_bodies import ErrorStyle
from gateway.errors import BadRequest, GatewayError, ServerFault, Unauthorized
from gateway.images import ImageLoader
from gateway.inference import GrpcInference, Inference
from gateway.lengths import BoundedInference
from gateway.logs import log_loop_error
from gateway.middleware.api_keys import ApiKeys
from gateway.middleware.cors import cors
from gateway.middleware.disconnect import Disconnect
from gateway.middleware.observation import Observation
from gateway.middleware.refusals import Refusals
from gateway.middleware.request_id import HEADER, RequestId
from gateway.middleware.slow_bodies import SlowBodies
from gateway.observed import Observed
from gateway.readiness import Readiness
from gateway.scoring import Scorer
from gateway.settings import Settings
from gateway.stage_watch import StageWatch
from gateway.vocabulary import Vocabulary
from gateway.wire import respond

logger = logging.getLogger(__name__)

_GC_THRESHOLD = 100_000
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

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        asyncio.get_running_loop().set_exception_handler(log_loop_error)
        # Made here: the gRPC channel belongs to the event loop that runs now.
        server = inference or GrpcInference(
            settings.servers,
            settings.request_timeout_s,
            settings.max_answer_bytes,
            limits=settings.admission_limits,
            repair_wait_s=settings.repair_wait_s,
        )
        own = Observed(server)
        bounded = BoundedInference(own, settings.max_text_bytes, settings.max_prompt_bytes)
        catalog = Catalog(own)
        stages = _watch_stages(server, catalog, settings) if isinstance(server, GrpcInference) else None
        readiness = Readiness(
            own,
            catalog,
            settings.canary_interval_s,
            settings.patience_s,
            stages.fault if stages else lambda pipeline: None,
            drain,
        )
        # One thread: a request with much to compare must not take the processor from all others.
        calculator = ThreadPoolExecutor(1, "calculator")
        scorer = Scorer(bounded, catalog, calculator, settings.max_products)
        images = ImageLoader(settings)
        app.state.services = Services(
            settings, bounded, catalog, readiness, Vocabulary(own), scorer, calculator, images
        )
        admission = server.admission if isinstance(server, GrpcInference) else None
        watches = [
            asyncio.create_task(readiness.watch()),
            asyncio.create_task(gauges.watch(readiness, admission)),
        ]
        if stages is not None:
            watches.append(asyncio.create_task(stages.run()))
        # What lives by now lives for ever: without it, collections of old objects double the 99th percentile.
        # And what a request leaves behind has no cycles: a collection is seldom worth its while.
        gc.freeze()
        gc.set_threshold(_GC_THRESHOLD, *gc.get_threshold()[1:])
        # uvicorn's part of the end, http_server.py, finds it there.
        yield {LIMITS: ConnectionLimits.of(settings), "drain": drain}
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        calculator.shutdown(wait=False, cancel_futures=True)
        await images.close()
        await own.close()
        if spans is not None:
            await asyncio.to_thread(spans.shutdown)

    spans = tracing.make_provider(settings.traces_url) if settings.traces_url else None
    # FastAPI's own /docs is blank on a machine without the internet: it takes its scripts from a CDN.
    app = FastAPIOffline(
        title="triton-embeddings",
        description=_DESCRIPTION + (_WITH_KEYS if access.asks_for_keys else _WITHOUT_KEYS),
        version=_VERSION,
        redoc_url=None,
        lifespan=lifespan,
        telemetry=tracing.fastapi_options(spans),
    )
    app.state.body_budget = BodyBudget(settings.max_body_bytes_total)
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
    if settings.cors_origins:
        app.add_middleware(cors, origins=settings.cors_origins)
    app.add_middleware(Draining, drain, _answer_refusal)
    app.add_middleware(Observation, has_access_log=settings.access_log)
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


def _watch_stages(inference: GrpcInference, catalog: Catalog, settings: Settings) -> StageWatch:
    return StageWatch(
        inference.servers,
        catalog,
        inference.availability,
        interval_s=settings.ping_interval_s,
        hang_timeout_s=settings.hang_timeout_s,
        patience_s=settings.patience_s,
    )


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
