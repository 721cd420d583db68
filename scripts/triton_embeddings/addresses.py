"""Where the gateway and the server listen."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass

from triton_embeddings.errors import CommandError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Addresses:
    """Where things listen; the server on loopback only."""

    host: str
    port: int
    http_port: int
    grpc_port: int
    metrics_port: int
    scheme: str = "http"

    def claim(self) -> Addresses:
        """The same with free ports for zeros.

        Raises CommandError, which names every port that cannot be used.
        """
        wanted = {
            "--port": (self.host, self.port),
            "--http-port": (LOOPBACK, self.http_port),
            "--grpc-port": (LOOPBACK, self.grpc_port),
            "--metrics-port": (LOOPBACK, self.metrics_port),
        }
        claimed: dict[str, int] = {}
        faults = []
        for flag, (host, port) in wanted.items():
            same = next((other for other, number in claimed.items() if number == port), None)
            if same is not None:
                faults.append(f"{same} and {flag} are both {port}; give one of them another")
                continue
            try:
                claimed[flag] = claim_port(host, port, flag)
            except CommandError as error:
                faults.append(str(error))
        if faults:
            raise CommandError("; ".join(dict.fromkeys(faults)))
        port, http_port, grpc_port, metrics_port = claimed.values()
        return Addresses(self.host, port, http_port, grpc_port, metrics_port, self.scheme)

    @property
    def url(self) -> str:
        """The gateway as a client on this machine reaches it."""
        host = "localhost" if self.host in ("0.0.0.0", "::", LOOPBACK) else self.host
        return f"{self.scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"


def claim_port(host: str, port: int, flag: str) -> int:
    """The port if it is free, a free one for 0. Raises CommandError, which names the flag that mends it."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise CommandError(f"{host} is no address of this machine; give another with --host") from error
        raise CommandError(
            f"port {port} on {host} cannot be used ({error.strerror or error}); stop what listens there, or "
            f"give another with {flag}"
        ) from error
