"""What an operator's probes ask: whether the process lives, and whether every model answers."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from gateway.endpoints.dialect import Dialect, services
from gateway.error_bodies import ErrorStyle
from gateway.gauges import show_models
from gateway.metrics import CONTENT_TYPE, render
from gateway.server_metrics import fetch_all
from gateway.wire import respond

router = APIRouter()


@router.get("/", include_in_schema=False)
async def root() -> Response:
    """A person who opens the address in a browser."""
    return RedirectResponse("/docs")


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="Whether the gateway is alive")
async def health() -> Response:
    """200 as long as the gateway's process runs, whatever the models do."""
    return respond({"status": "ok"})


@router.head("/ready", include_in_schema=False)
@router.get("/ready", summary="Whether every model answers")
async def ready(request: Request) -> Response:
    """200 when a real inference of every model went through lately, else 503 with the reasons."""
    report = services(request).readiness.report()
    models = {
        name: {"ready": reason is None, "reason": reason, "has_failed": name in report.failed}
        for name, reason in report.models.items()
    }
    status = "ready" if report.is_ready else "not ready"
    return respond(
        {"status": status, "reason": report.reason, "models": models}, 200 if report.is_ready else 503
    )


@router.get("/metrics", summary="Numbers for Prometheus")
async def metrics(request: Request) -> Response:
    """The gateway's numbers, those of the models' stages, and the inference server's own (nv_*)."""
    settings = services(request).settings
    show_models(services(request).readiness)
    own = await asyncio.to_thread(render, settings.multiprocess_folder)
    servers = await fetch_all(settings.metrics_servers)
    return Response(own + servers, media_type=CONTENT_TYPE)


DIALECT = Dialect(router, ErrorStyle(lambda error: {"error": error.message}))
