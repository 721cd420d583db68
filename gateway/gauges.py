"""Shows the state of things at /metrics, once a second: what changes all the time is not worth more."""

from __future__ import annotations

import asyncio
import logging

from gateway import metrics
from gateway.catalog import Catalog
from gateway.inference import GrpcInference
from gateway.readiness import Readiness

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0


def show_models(readiness: Readiness) -> None:
    """Of this worker, now."""
    report = readiness.report()
    metrics.show_models(report.models, is_server_up=report.reason is None)


def _show_servers(catalog: Catalog, inference: GrpcInference) -> None:
    answers: dict[tuple[str, str], bool] = {}
    for server in inference.servers:
        for pipeline in catalog.pipelines:
            losses = [inference.availability.loss(server.address, name) for name in pipeline.ensembles]
            key = server.address, pipeline.served_model_name
            answers[key] = answers.get(key, True) and not any(losses)
    metrics.show_servers(answers)


async def watch(readiness: Readiness, catalog: Catalog, inference: GrpcInference | None) -> None:
    """For ever. Without an inference of its own kind nothing is told of what waits, nor of single servers."""
    before: dict[str, metrics.Load] = {}
    while True:
        try:
            show_models(readiness)
            if inference is not None:
                _show_servers(catalog, inference)
            for name, load in inference.admission.states().items() if inference is not None else ():
                metrics.show_load(load, before.get(name))
                before[name] = load
        except Exception:
            # What is shown grows old, but not for ever.
            logger.exception("the state of things cannot be shown at /metrics")
        await asyncio.sleep(_INTERVAL_S)
