"""Runs the gateway alone: python -m gateway. Settings come from GATEWAY_* environment variables."""

from __future__ import annotations

import logging
import sys

import uvicorn
from fastapi import FastAPI

from gateway import http_server
from gateway.app import create_app
from gateway.settings import Settings

logger = logging.getLogger(__name__)


def application() -> FastAPI:
    """The application of one worker."""
    settings = Settings()
    _log(settings)
    return create_app(settings)


def _log(settings: Settings) -> None:
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


def main() -> None:
    """Serves until SIGTERM or Ctrl-C, then finishes the requests that it has accepted."""
    settings = Settings()
    _log(settings)
    logger.info("listening on %s:%d, inference server %s", settings.host, settings.port, settings.server)
    try:
        listener = http_server.listen(settings.host, settings.port, is_shared=settings.reuse_port)
    except OSError as error:
        sys.exit(
            f"error: port {settings.port} on {settings.host} cannot be used ({error.strerror or error}); "
            "stop what listens there, or give another with GATEWAY_PORT (two gateways share one where both "
            "have GATEWAY_REUSE_PORT=true)"
        )
    config = uvicorn.Config(
        "gateway.__main__:application",
        factory=True,
        workers=settings.workers,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        # One line for each request costs a tenth of the throughput.
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=settings.drain_timeout_s,
    )
    if not http_server.run(config, listener):
        sys.exit(1)


if __name__ == "__main__":
    main()
