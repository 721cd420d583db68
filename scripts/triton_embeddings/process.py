"""Child processes that never outlive this one."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from triton_embeddings.errors import CommandError

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Child:
    """A process in a session of its own: Ctrl-C reaches this process only, which stops its children
    in order.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        environment: Mapping[str, str],
        output: IO[bytes] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [str(part) for part in command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def stop(self, timeout_s: float) -> None:
        """Asks it to end, waits, and kills what is left of its session."""
        if self.exit_code is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
        self.kill()

    def kill(self) -> None:
        """Ends it and its own children at once; does nothing when they have ended."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._process.wait()


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


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
            f"port {port} on {host} cannot be used ({error.strerror or error}); "
            f"stop what listens there, or give another with {flag}"
        ) from error
