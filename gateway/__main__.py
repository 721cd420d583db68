"""Runs the gateway alone: python -m gateway. Settings come from GATEWAY_* environment variables."""

from __future__ import annotations

import logging
import os
import resource
import sys
import tempfile
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from gateway import http_server
from gateway.access import Access
from gateway.app import create_app
from gateway.connection import GuardedProtocol
from gateway.keys import UnusableKeys
from gateway.logs import configure
from gateway.settings import Settings

logger = logging.getLogger(__name__)

# prometheus-client reads it when it is imported.
_METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"


# Files and connections that are no client's.
_OTHER_FILES = 128


def application() -> FastAPI:
    """The application of one worker."""
    settings = Settings()
    configure(settings.log_level, settings.log_format)
    return create_app(settings)


def main() -> None:
    """Serves until SIGTERM or Ctrl-C, then finishes the requests that it has accepted."""
    try:
        settings = Settings()
        access = Access(settings)
    except (UnusableKeys, ValidationError) as error:
        sys.exit(f"error: {error}")
    configure(settings.log_level, settings.log_format)
    _allow_files(settings.max_connections + _OTHER_FILES)
    logger.info(
        "listening on %s:%d, inference server %s, %s",
        settings.host,
        settings.port,
        settings.server,
        "an API key is asked for" if access.asks_for_keys else "no API key is asked for",
    )
    if settings.workers == 1:
        os.environ.pop(_METRICS_FOLDER, None)
        _run(settings)
        return
    with tempfile.TemporaryDirectory(prefix="triton-embeddings-metrics-") as folder:
        # Workers are processes of their own, which find each other's numbers there.
        os.environ[_METRICS_FOLDER] = folder
        _run(settings)


def _run(settings: Settings) -> None:
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
        **server_options(settings),
    )
    if not http_server.run(config, listener):
        sys.exit(1)


def server_options(settings: Settings) -> dict[str, Any]:
    """What uvicorn is told of every server, whatever starts it."""
    return {
        "host": settings.host,
        "port": settings.port,
        "loop": "uvloop",
        "http": GuardedProtocol,
        "ws": "none",
        "ssl_certfile": settings.tls_cert_file,
        "ssl_keyfile": settings.tls_key_file,
        "ssl_keyfile_password": (
            None if settings.tls_key_password is None else settings.tls_key_password.get_secret_value()
        ),
        # One line for each request costs a tenth of the throughput; GATEWAY_ACCESS_LOG asks for ours.
        "access_log": False,
        # Its loggers write as all others do.
        "log_config": None,
        "server_header": False,
        "timeout_graceful_shutdown": settings.drain_timeout_s,
    }


def _allow_files(count: int) -> None:
    """Many systems let a process have 1024 open files, until it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


if __name__ == "__main__":
    main()
