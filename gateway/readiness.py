"""Knows of every model whether it answers: by its traffic, and without traffic by a canary inference.

The server's own health endpoints stay green when the process behind a model has died (2.51), so nothing but
an inference tells.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from backends.contract import TASK_OUTPUTS, RequestParameter
from gateway.catalog import Catalog
from gateway.errors import GatewayError
from gateway.inference import Inference, Pipeline

logger = logging.getLogger(__name__)

_CANARY = b"ready?"
# How soon a model that does not answer is asked again.
_RETRY_INTERVAL_S = 0.25
# A model is believed for this many intervals after its last answer.
_PATIENCE = 3


@dataclass(frozen=True)
class Report:
    """What /ready says."""

    models: Mapping[str, str | None]
    """By name: why a model does not answer, or None when it does."""
    reason: str | None
    """Why nothing can be said of any model, such as a server that cannot be reached."""

    @property
    def is_ready(self) -> bool:
        return self.reason is None and all(reason is None for reason in self.models.values())


class Readiness:
    """Runs for the lifetime of the gateway."""

    def __init__(self, inference: Inference, catalog: Catalog, interval_s: float) -> None:
        self._inference = inference
        self._catalog = catalog
        self._interval_s = interval_s
        self._reason: str | None = "no model was looked at yet"
        self._failures: dict[str, str] = {}
        self.is_draining = False
        self.started_at = int(time.time())
        """Seconds since 1970."""

    def report(self) -> Report:
        """The state as known by now; asks nobody."""
        if self.is_draining:
            return Report({}, "the gateway is stopping")
        models = {p.served_model_name: self._fault(p) for p in self._catalog.pipelines}
        return Report(models, self._reason)

    async def watch(self) -> None:
        """Looks at the models for ever, more often while one of them does not answer."""
        while True:
            try:
                await self._look()
            except Exception:
                logger.exception("the look at the models failed")
                self._reason = "an unexpected error; the gateway's log tells what it was"
            is_ready = self.report().is_ready
            await asyncio.sleep(self._interval_s if is_ready else min(_RETRY_INTERVAL_S, self._interval_s))

    async def _look(self) -> None:
        try:
            pipelines = await self._catalog.refresh()
        except GatewayError as error:
            if self._reason is None:
                logger.warning("%s", error.message)
            self._reason = error.message
            return
        self._reason = None if pipelines else "the server has no models; add one with: triton-embeddings add"
        await asyncio.gather(*(self._ask(pipeline) for pipeline in pipelines))

    async def _ask(self, pipeline: Pipeline) -> None:
        last = self._inference.last_success(pipeline)
        is_fresh = last is not None and time.monotonic() - last < self._interval_s
        if is_fresh and pipeline.name not in self._failures:
            return
        outputs = [name for task in sorted(pipeline.tasks) for name in TASK_OUTPUTS[task]]
        try:
            await self._inference.infer(pipeline, [_CANARY], outputs, {RequestParameter.TRUNCATION: "right"})
        except GatewayError as error:
            if pipeline.name not in self._failures:
                logger.warning("%s does not answer: %s", pipeline.served_model_name, error.message)
            self._failures[pipeline.name] = error.message
        else:
            if self._failures.pop(pipeline.name, None) is not None:
                logger.info("%s answers again", pipeline.served_model_name)

    def _fault(self, pipeline: Pipeline) -> str | None:
        if pipeline.name in self._failures:
            return self._failures[pipeline.name]
        last = self._inference.last_success(pipeline)
        if last is None:
            return "it has not answered yet"
        age = time.monotonic() - last
        return None if age < _PATIENCE * self._interval_s else f"its last answer was {age:.0f} s ago"
