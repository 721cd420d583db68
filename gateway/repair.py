"""Puts a new process in the place of one that died or stands still: unloads the stage's entry and loads it.

The server never does so itself (2.51). Ensembles over the entry come back with it, and other models go on
serving meanwhile. Gateways on one machine take turns by a file's lock, so that none replaces what another has
just replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gateway.inference_server import InferenceServer, LoadFailed
from gateway.local_stubs import kill_stubs

logger = logging.getLogger(__name__)

# How soon an entry that could not be loaded is tried again, at first and at most.
_FIRST_BACKOFF_S = 1.0
_LONGEST_BACKOFF_S = 60.0


@dataclass
class _Failure:
    reason: str
    backoff_s: float
    again_at: float
    """time.monotonic()."""


class Repairs:
    """Of all entries and servers."""

    def __init__(self) -> None:
        self._failures: dict[tuple[str, str], _Failure] = {}

    def failure(self, address: str, entry: str) -> str | None:
        """Why an entry could not be loaded anew, if that was tried."""
        failure = self._failures.get((address, entry))
        return failure.reason if failure else None

    def recovered(self, address: str, entry: str) -> None:
        """It answers."""
        self._failures.pop((address, entry), None)

    async def replace(
        self, server: InferenceServer, entry: str, is_needed: Callable[[], Awaitable[bool]]
    ) -> bool:
        """Whether the entry was loaded anew; `is_needed` is asked when nobody else can do the same.

        False where another gateway is at it, where it is not needed any more, or where loading failed, which
        is tried again later and later.
        """
        failure = self._failures.get((server.address, entry))
        if failure is not None and time.monotonic() < failure.again_at:
            return False
        with _lock(server.address, entry) as is_ours:
            if not is_ours or not await is_needed():
                return False
            started = time.monotonic()
            try:
                # Unloading waits for ever for a process that stands still. One that ends while it holds a
                # lock that the server waits for ends the server, too (2.51: boost's lock_exception); so did
                # 2 of 32 encoders that were halted under load.
                await asyncio.to_thread(kill_stubs, server.address, entry)
                await server.unload(entry)
                await server.load(entry)
            except LoadFailed as error:
                self._note(server.address, entry, str(error))
                return False
        logger.warning("%s was loaded anew in %.1f s", entry, time.monotonic() - started)
        return True

    def _note(self, address: str, entry: str, reason: str) -> None:
        before = self._failures.get((address, entry))
        backoff = min(2 * before.backoff_s, _LONGEST_BACKOFF_S) if before else _FIRST_BACKOFF_S
        self._failures[address, entry] = _Failure(reason, backoff, time.monotonic() + backoff)
        logger.error("%s cannot be loaded anew, next try in %g s: %s", entry, backoff, reason)


@contextlib.contextmanager
def _lock(address: str, entry: str) -> Iterator[bool]:
    """Whether no other process of this user has it. Without a folder for locks everybody has it: to load a
    stage twice is better than never.
    """
    try:
        descriptor = _open_lock(f"{address}-{entry}.lock".replace("/", "_"))
    except OSError as error:
        logger.warning("several gateways on this machine may load %s anew at once: %s", entry, error)
        yield True
        return
    try:
        is_ours = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_ours = False
        yield is_ours
    finally:
        os.close(descriptor)


def _open_lock(name: str) -> int:
    """A file in a folder that nobody else can write to, though it lies where everybody can.

    Raises OSError.
    """
    folder = Path(tempfile.gettempdir()) / f"triton-embeddings-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    inside = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(inside)
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError(f"{folder} is not this user's alone to write to")
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=inside)
    finally:
        os.close(inside)
