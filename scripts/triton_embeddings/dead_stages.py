"""What the processes of stages that died have left in /dev/shm and in the server.

Where a request was inside such a process, server 2.51 keeps the whole stage for good, though its entry was
unloaded: the region through which they spoke, as large as the largest batch ever was, 36 threads and 0.7 MiB
of its own. Only another server gives that back.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

from triton_embeddings.shared_memory import MIB, SHARED_MEMORY

# What stages that died may keep together: about 1200 threads, and of /dev/shm this part, or less of a
# large one, for it is memory.
_MOST = 32
_LARGEST_PART = 0.25
_MOST_BYTES = 256 * MIB
# A region is there before its process, and after it: the server takes it away in a moment, or in a few where
# the machine is busy.
_DEAD_AFTER_S = 5.0
_INTERVAL_S = 1.0


class DeadStages:
    """Of a server whose regions have a prefix of their own."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._since: dict[Path, float] = {}
        self._look_at = 0.0

    def reason_for_another_server(self) -> str | None:
        """Why the server should be started again, where what it keeps of the dead is too much."""
        now = time.monotonic()
        if now < self._look_at:
            return None
        self._look_at = now + _INTERVAL_S
        self._since = {region: self._since.get(region, now) for region in self._without_process()}
        dead = [region for region, since in self._since.items() if now - since >= _DEAD_AFTER_S]
        size = sum(map(_allocated, dead))
        bound = min(_LARGEST_PART * shutil.disk_usage(SHARED_MEMORY).total, _MOST_BYTES)
        if len(dead) < _MOST and size < bound:
            return None
        stages = "a stage" if len(dead) == 1 else f"{len(dead)} stages"
        return f"tritonserver does not give back {size // MIB} MiB of {SHARED_MEMORY} of {stages} that died"

    def _without_process(self) -> set[Path]:
        regions = {region.name.encode(): region for region in SHARED_MEMORY.glob(f"{self._prefix}*")}
        if not regions:
            return set()
        # The server tells a process on its command line which region is its own.
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                for word in file.read_bytes().split(b"\0"):
                    regions.pop(word, None)
        return set(regions.values())


def _allocated(region: Path) -> int:
    """Bytes; 0 where the server has just taken it away."""
    with contextlib.suppress(FileNotFoundError):
        return region.stat().st_blocks * 512
    return 0
