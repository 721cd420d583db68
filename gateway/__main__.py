"""Runs the gateway alone: python -m gateway. Settings come from GATEWAY_* environment variables."""

from __future__ import annotations

import logging

import uvicorn

from gateway.app import create_app
from gateway.settings import Settings

logger = logging.getLogger(__name__)


def main() -> None:
    """Serves until SIGTERM or Ctrl-C, then finishes the requests that it has accepted."""
    settings = Settings()
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logger.info("listening on %s:%d, inference server %s", settings.host, settings.port, settings.server)
    uvicorn.run(
        create_app(settings),
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


if __name__ == "__main__":
    main()
