"""Runs `triton-embeddings add` and `remove` for the servers that this gateway asks, in a process of its own:
what reads checkpoints stays out of the gateway's.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Mapping, Sequence

from gateway.access import is_loopback
from gateway.errors import BadRequest, ServerFault

_COMMAND = (sys.executable, "-c", "from triton_embeddings.cli import main; main()")
# Weights of gigabytes come from a slow disk.
_TIMEOUT_S = 3600.0


class LiveCommand:
    """Changes the models of all servers, one change at a time. A client that leaves ends no change."""

    def __init__(self, addresses: Sequence[str]) -> None:
        """host:port of the servers."""
        self._addresses = addresses
        self._turn = asyncio.Lock()
        self._changes: set[asyncio.Task[str]] = set()

    async def add(self, checkpoint: str, name: str | None, options: Mapping[str, str | int | bool]) -> str:
        """What the command says. Raises BadRequest where it fails; the models are then as they were, of the
        servers before the first that failed the new ones.
        """
        arguments = ["add", checkpoint, *(("--name", name) if name else ())]
        for option, value in options.items():
            flag = option.replace("_", "-")
            if isinstance(value, bool):
                arguments.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                arguments.append(f"--{flag}={value}")
        return await self._run(arguments)

    async def remove(self, name: str) -> str:
        """What the command says. Raises BadRequest where it fails."""
        return await self._run(["remove", name])

    async def _run(self, arguments: Sequence[str]) -> str:
        ports = [_local_port(address) for address in self._addresses]
        change = asyncio.create_task(self._run_all(arguments, ports))
        self._changes.add(change)
        change.add_done_callback(self._changes.discard)
        return await asyncio.shield(change)

    async def _run_all(self, arguments: Sequence[str], ports: Sequence[str]) -> str:
        async with self._turn:
            said = ""
            for port in ports:
                said = await _run_one([*arguments, "--live", f"--grpc-port={port}"])
            return said


def _local_port(address: str) -> str:
    """Raises BadRequest where the server may be on another machine: the command would change the one that has
    this port here.
    """
    host, _, port = address.rpartition(":")
    if not is_loopback(host.strip("[]")):
        raise BadRequest(
            f"the server {address} is not asked at an address of this machine alone (127.0.0.1), and models "
            "are changed only where the server runs: use triton-embeddings add --live there, or the admin "
            "routes of a gateway there",
            code="not_changed",
        )
    return port


async def _run_one(arguments: Sequence[str]) -> str:
    process = await asyncio.create_subprocess_exec(
        *_COMMAND,
        *arguments,
        cwd="/",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # Whoever kills all of the gateway does not keep it from undoing.
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            output, errors = await process.communicate()
    except TimeoutError as error:
        raise ServerFault(f"the change was not done within {_TIMEOUT_S:g} s, and was given up") from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                # It undoes what it has done. Who does not wait kills it meanwhile.
                process.terminate()
            await process.wait()
    if process.returncode:
        said = errors.decode(errors="replace").strip()
        raise BadRequest(said.rpartition("error: ")[2] or said, code="not_changed")
    return output.decode(errors="replace").strip()
