"""Shows the state of things at /metrics, once a second: what changes all the time is not worth more."""

from __future__ import annotations

import asyncio

from gateway import metrics
from gateway.metrics import Load
from gateway.readiness import Readiness

_INTERVAL_S = 1.0


def show_models(readiness: Readiness) -> None:
    """Of this worker, now."""
    report = readiness.report()
    metrics.show_models(report.models, is_server_up=report.reason is None)


async def watch(readiness: Readiness, load: Load | None = None) -> None:
    """For ever. `load` is what admission knows, where there is one."""
    while True:
        show_models(readiness)
        if load is not None:
            metrics.show_load(load)
        await asyncio.sleep(_INTERVAL_S)
