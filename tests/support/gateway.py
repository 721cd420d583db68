"""The gateway behind a real socket, in a thread of the test's own process, over any inference."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn

from gateway.__main__ import server_options
from gateway.app import create_app
from gateway.settings import Settings
from tests.support.server import free_ports, wait_until


@dataclass
class Gateway:
    """A running gateway."""

    address: tuple[str, int]
    server: uvicorn.Server

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.address)

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self.server.server_state.connections)


@contextlib.contextmanager
def listening(inference: Any, **settings: Any) -> Iterator[Gateway]:
    """As `python -m gateway` sets it up."""
    (port,) = free_ports(1)
    given = Settings(port=port, drain_timeout_s=1, **settings)
    config = uvicorn.Config(create_app(given, inference), log_level="warning", **server_options(given))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), "the gateway to listen")
        assert server.started
        yield Gateway(("127.0.0.1", port), server)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the gateway did not stop"
