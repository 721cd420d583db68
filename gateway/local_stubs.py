"""The processes of stages on this machine, found in /proc: a death is known at once, and one that stands
still can be ended, which the server needs before it can unload its entry (2.51).

Of a server on another machine nothing is found, and pings alone tell.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
from collections.abc import Iterable
from pathlib import Path

_PROC = Path("/proc")
_STUB = b"triton_python_backend_stub"
_LISTENS = "0A"
# By a signal, and by a debugger.
_STOPPED = "Tt"


def find_stubs(address: str, entry: str) -> list[int]:
    """Process ids of a stage's entry at the server with that address; those that have ended are not there."""
    server = _server_process(address)
    if server is None:
        return []
    found, parents = [], {server}
    # A stub is the server's child, or that of a shell in between.
    for pid, parent, command in sorted(_processes()):
        if parent in parents:
            parents.add(pid)
            if _STUB in command.split(b"\0")[0] and f"/{entry}/".encode() in command:
                found.append(pid)
    return found


def kill_stubs(address: str, entry: str) -> None:
    """Ends what is left of an entry's processes at once."""
    for pid in find_stubs(address, entry):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def stand_still(pids: Iterable[int]) -> bool:
    """Whether all of these processes are stopped, by a signal or a debugger; not of none."""
    states = []
    for pid in pids:
        with contextlib.suppress(OSError):
            states.append(_stat(_PROC / str(pid))[0])
    return bool(states) and all(state in _STOPPED for state in states)


def _server_process(address: str) -> int | None:
    """Who listens on a port of this machine's loopback."""
    host, _, port = address.rpartition(":")
    if not _is_here(host):
        return None
    sockets = _listening(int(port))
    for folder in _PROC.glob("[0-9]*"):
        # Processes come and go while one looks at them, and some are not ours to look at.
        with contextlib.suppress(OSError):
            if not (folder / "comm").read_text().startswith("tritonserver"):
                continue
            for descriptor in (folder / "fd").iterdir():
                if os.readlink(descriptor) in sockets:
                    return int(folder.name)
    return None


def _is_here(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _listening(port: int) -> set[str]:
    """The sockets that wait for connections on a port, as links of /proc/PID/fd name them."""
    found = set()
    for name in ("tcp", "tcp6"):
        file = _PROC / "net" / name
        for line in file.read_text().splitlines()[1:] if file.exists() else ():
            fields = line.split()
            if fields[3] == _LISTENS and int(fields[1].rsplit(":", 1)[1], 16) == port:
                found.add(f"socket:[{fields[9]}]")
    return found


def _processes() -> list[tuple[int, int, bytes]]:
    """Process id, parent and command line of all that can be read; of one that has ended, no command."""
    found = []
    for folder in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int(_stat(folder)[1])
            found.append((int(folder.name), parent, (folder / "cmdline").read_bytes()))
    return found


def _stat(folder: Path) -> list[str]:
    """State, parent, and what else /proc/PID/stat tells behind the command."""
    return (folder / "stat").read_text().rsplit(")", 1)[1].split()
