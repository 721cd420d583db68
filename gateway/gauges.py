"""Shows the state of things at /metrics, once a second: what changes all the time is not worth more."""

from __future__ import annotations

import asyncio
import logging

from gateway import metrics
from gateway.admission import Admission
from gateway.readiness import Readiness

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0


def show_models(readiness: Readiness) -> None:
    """Of this worker, now."""
    report = readiness.report()
    metrics.show_models(report.models, is_server_up=report.reason is None)


async def watch(readiness: Readiness, admission: Admission | None) -> None:
    """For ever. Without admission nothing is told of what waits."""
    before: dict[str, metrics.Load] = {}
    while True:
        try:
            show_models(readiness)
            for name, load in admission.states().items() if admission is not None else ():
                metrics.show_load(load, before.get(name))
                before[name] = load
        except Exception:
            # What is shown grows old, but not for ever.
            logger.exception("the state of things cannot be shown at /metrics")
        await asyncio.sleep(_INTERVAL_S)
