"""Runs the gateway alone: python -m gateway. Settings come from GATEWAY_* environment variables."""

from __future__ import annotations

import logging
import os
import tempfile

import uvicorn
from fastapi import FastAPI

from gateway.app import create_app
from gateway.logs import configure
from gateway.settings import Settings

logger = logging.getLogger(__name__)

# prometheus-client reads it when it is imported.
_METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"


def application() -> FastAPI:
    """The application of one worker."""
    settings = Settings()
    configure(settings.log_level, settings.log_format)
    return create_app(settings)


def main() -> None:
    """Serves until SIGTERM or Ctrl-C, then finishes the requests that it has accepted."""
    settings = Settings()
    configure(settings.log_level, settings.log_format)
    logger.info("listening on %s:%d, inference server %s", settings.host, settings.port, settings.server)
    if settings.workers == 1:
        os.environ.pop(_METRICS_FOLDER, None)
        _run(settings)
        return
    with tempfile.TemporaryDirectory(prefix="triton-embeddings-metrics-") as folder:
        # Workers are processes of their own, which find each other's numbers there.
        os.environ[_METRICS_FOLDER] = folder
        _run(settings)


def _run(settings: Settings) -> None:
    uvicorn.run(
        "gateway.__main__:application",
        factory=True,
        workers=settings.workers,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        # One line for each request costs a tenth of the throughput; GATEWAY_ACCESS_LOG asks for ours.
        access_log=False,
        # Its loggers write as all others do.
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=settings.drain_timeout_s,
    )


if __name__ == "__main__":
    main()
