"""What a server still holds of stages whose processes died.

Where a request was inside such a process, server 2.51 keeps the whole stage for good, though its entry was
unloaded: the region of /dev/shm through which they spoke, as large as the largest batch ever was, 36 threads
and 0.7 MiB of its own. Only another server gives that back.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from triton_embeddings.shared_memory import MIB, SHARED_MEMORY

# What dead stages may hold together: nearly 600 threads, this part of /dev/shm, and so much memory.
_MOST = 16
_LARGEST_PART = 1 / 8
_MOST_BYTES = 1024 * MIB
# A stage that is loaded needs 1 MiB.
_ROOM_FOR_ONE = 2 * MIB
# A request that ends a process each time takes all models down no more often.
_PAUSE_S = 60.0
_INTERVAL_S = 5.0
# Looks after which one that is not replaced has been dead for some time.
_LOOKS_WITHOUT = 4


@dataclass
class _Region:
    stage: bytes
    """The file of its model."""
    alive_at: int
    """The last look at which its process lived; looks are counted, and not seconds, for a busy machine."""
    replaced_at: int | None = None
    """The look that found a new process of the stage."""


class DeadStages:
    """Of servers, one after the other, whose regions have a prefix of their own."""

    def __init__(self, prefix: str) -> None:
        self._prefix = os.fsencode(prefix)
        self._look_at = self._deaf_until = 0.0
        self._looks = 0
        self._known: dict[bytes, _Region] = {}

    def reason_for_another_server(self, server: int) -> str | None:
        """Why the server, told by its process group, should be started again: what it holds is too much.

        Looks now and then only. Where the system does not let it look, there is no reason.
        """
        now = time.monotonic()
        if now < self._look_at:
            return None
        self._look_at = now + _INTERVAL_S
        with contextlib.suppress(OSError):
            reason = self._look(server)
            if reason is not None and now >= self._deaf_until:
                self._deaf_until = now + _PAUSE_S
                return reason
        return None

    def _look(self, server: int) -> str | None:
        self._looks += 1
        sizes = self._sizes()
        self._known = {name: region for name, region in self._known.items() if name in sizes}
        started = set()
        for stage, name in self._living(server):
            if name not in self._known:
                started.add(stage)
                self._known[name] = _Region(stage, self._looks)
            self._known[name].alive_at = self._looks
        dead = {name: region for name, region in self._known.items() if region.alive_at < self._looks}
        for region in dead.values():
            if region.replaced_at is None and region.stage in started:
                region.replaced_at = self._looks
        held = {name: region for name, region in dead.items() if self._is_kept(region)}
        size = sum(sizes[name] for name in held)
        # Of a stage with several processes all were replaced at once.
        count = len({(region.stage, region.replaced_at) for region in held.values()})
        disk = shutil.disk_usage(SHARED_MEMORY)
        # A size of 0 is none.
        bound = min(_LARGEST_PART * disk.total or _MOST_BYTES, _MOST_BYTES)
        if held and (count >= _MOST or size >= bound):
            return _describe(size, count)
        left = {name: region for name, region in dead.items() if self._is_left(region)}
        size = sum(sizes[name] for name in left)
        if disk.total and disk.free < _ROOM_FOR_ONE <= disk.free + size:
            # None of them can be replaced.
            return _describe(size, len({region.stage for region in left.values()}))
        return None

    def _is_kept(self, region: _Region) -> bool:
        """Whether the server keeps it for good: until another is loaded its entry may not be unloaded yet,
        and then it goes in a moment.
        """
        return region.replaced_at is not None and region.replaced_at < self._looks

    def _is_left(self, region: _Region) -> bool:
        """Whether its process has been dead for some time."""
        return self._looks - region.alive_at >= _LOOKS_WITHOUT

    def _sizes(self) -> dict[bytes, int]:
        """Of all regions that are there, in bytes."""
        found = {}
        with os.scandir(os.fsencode(SHARED_MEMORY)) as entries:
            for entry in entries:
                if entry.name.startswith(self._prefix):
                    with contextlib.suppress(FileNotFoundError):
                        found[entry.name] = entry.stat(follow_symlinks=False).st_blocks * 512
        return found

    def _living(self, server: int) -> Iterator[tuple[bytes, bytes]]:
        """Stage and region of each of the server's processes: they stand on its command line side by side."""
        for pid in os.listdir("/proc"):
            # Processes end while one looks at them. A stranger's is not read: that may wait for its memory's
            # lock.
            with contextlib.suppress(OSError):
                if pid.isdigit() and os.getpgid(int(pid)) == server:
                    words = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
                    yield from (
                        pair for pair in itertools.pairwise(words) if pair[1].startswith(self._prefix)
                    )


def _describe(size: int, count: int) -> str:
    stages = "a stage" if count == 1 else f"{count} stages"
    held = f"{size // MIB} MiB of {SHARED_MEMORY}, and threads"
    return f"tritonserver does not give back {held}, of {stages} that died"
