"""The clock by which stages and the gateway tell each other when something was."""

from __future__ import annotations

import time


def now_us() -> int:
    """Microseconds of CLOCK_MONOTONIC, which all processes of a machine share."""
    return time.monotonic_ns() // 1000
