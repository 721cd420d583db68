"""uvicorn with an end that fails nobody, in one process or several; `drain.py` says what becomes of requests.

The port is given up first: new connections go to another gateway that listens on it, or are refused at once.
"""

from __future__ import annotations

import asyncio
import functools
import signal
import socket
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import uvicorn
import uvicorn.supervisors.multiprocess

from gateway.drain import Drain

# For the last answers to be written, after the deadline.
_LAST_WORDS_S = 2
_POLL_INTERVAL_S = 0.05
_HANDSHAKE_TIMEOUT_S = 10.0
# Of the event loop: in each it takes in what waits.
_TURNS = 2


def listen(host: str, port: int, *, is_shared: bool) -> socket.socket:
    """A socket on the port, which may be `is_shared` with other gateways. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_shared:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        made.bind(address)
    except OSError:
        made.close()
        raise
    made.set_inheritable(True)
    return made


def run(config: uvicorn.Config, listener: socket.socket) -> bool:
    """Serves until SIGTERM or Ctrl-C; whether it had started."""
    if config.workers > 1:
        # uvicorn has no other way to give its workers a server of ours.
        uvicorn.supervisors.multiprocess.Process = _Worker  # type: ignore[misc]
        _Workers(config, [listener]).run()
        return True
    # uvicorn raises the signal once more when it is done; a process that ended in order is none that was
    # killed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    server = DrainingServer(config)
    server.run([listener])
    return server.started


class DrainingServer(uvicorn.Server):
    """The server of one process. Its application's lifespan state holds a Drain as `drain`."""

    _listeners: Sequence[socket.socket] = ()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn with the sockets that it listens on."""
        self._listeners = sockets or ()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn for a signal. Where all others that listen on its sockets stop, too, connections
        wait in them for nobody as long as it has not started.
        """
        super().handle_exit(sig, frame)
        if not self.started:
            for listener in self._listeners:
                listener.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn, which has no option for the handshake; the loop's own minute would let those who
        never finish it keep files that no other limit counts.
        """
        loop: Any = asyncio.get_running_loop()
        if self.config.is_ssl:
            loop.create_server = functools.partial(
                loop.create_server, ssl_handshake_timeout=_HANDSHAKE_TIMEOUT_S
            )
        try:
            await super().startup(sockets)
        except OSError:
            if not self.should_exit:
                raise
            # It was told to stop before it listened.
            await self.lifespan.shutdown()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn after the signal."""
        deadline = time.monotonic() + (self.config.timeout_graceful_shutdown or 0)
        drain: Drain = self.lifespan.state["drain"]
        # Connections that are made already are taken in, for closing the socket breaks them.
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        drain.begin()
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        # One without a request ends as it always does, so that none is closed under a request on its way.
        idle_s = self.config.timeout_keep_alive
        await self._wait_for_connections(min(deadline, time.monotonic() + idle_s))
        for connection in list(self.server_state.connections):
            # What is open by now is at work, and is closed with its answer.
            connection.shutdown()
        await self._wait_for_connections(deadline)
        drain.end()
        self.config.timeout_graceful_shutdown = _LAST_WORDS_S
        await super().shutdown(sockets)

    async def _wait_for_connections(self, until: float) -> None:
        while self.server_state.connections and time.monotonic() < until and not self.force_exit:
            await asyncio.sleep(_POLL_INTERVAL_S)


class _Worker(uvicorn.supervisors.multiprocess.Process):
    @property
    def server(self) -> uvicorn.Server:
        if self._server is None:
            self._server = DrainingServer(self.config)
        return self._server


class _Workers(uvicorn.supervisors.multiprocess.Multiprocess):
    def terminate_all(self) -> None:
        # As long as this process has the port connections wait in it, for nobody.
        for listener in self.sockets:
            listener.close()
        super().terminate_all()
