"""Knows of every model whether it answers: by the pings of its stages, by its traffic, and without traffic by
a canary inference.

The server's own health endpoints stay green when the process behind a model has died (2.51). Pings
(`stage_watch.py`) tell that within a second or two; that the stages together give an answer only an inference
tells.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from backends.contract import IMAGE_GRID, TASK_OUTPUTS, RequestParameter
from gateway.batches import Content
from gateway.catalog import Catalog
from gateway.drain import Drain
from gateway.errors import GatewayError
from gateway.inference import Inference
from gateway.pipeline import Pipeline

logger = logging.getLogger(__name__)

_CANARY = b"ready?"
# A grey pixel, as PNG.
_IMAGE_CANARY = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a4944415478da6368000000820081da45083b0000000049454e44ae426082"
)
# How soon a model that does not answer is asked again.
_RETRY_INTERVAL_S = 0.25
# A list of models takes milliseconds.
_LIST_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Report:
    """What /ready says."""

    models: Mapping[str, str | None]
    """By name: why a model does not answer, or None when it does."""
    failed: frozenset[str]
    """Those among them that gave an error, rather than no answer yet."""
    reason: str | None
    """Why nothing can be said of any model, such as a server that cannot be reached."""

    @property
    def is_ready(self) -> bool:
        return self.reason is None and all(reason is None for reason in self.models.values())


class Readiness:
    """Runs for the lifetime of the gateway."""

    def __init__(
        self,
        inference: Inference,
        catalog: Catalog,
        interval_s: float,
        patience_s: float,
        stage_fault: Callable[[Pipeline], str | None] = lambda pipeline: None,
        drain: Drain | None = None,
    ) -> None:
        """A model without traffic is asked every `interval_s`, and believed for `patience_s` after its last
        answer, unless `stage_fault` says why a stage of it does not answer.

        The patience is for models that are busy: a canary waits in the same queue as everybody's work.
        """
        self._inference = inference
        self._catalog = catalog
        self._interval_s = interval_s
        self._patience_s = patience_s
        self._stage_fault = stage_fault
        self._drain = drain or Drain()
        self._reason: str | None = "no model was looked at yet"
        self._failures: dict[str, str] = {}
        self._canaries: dict[str, asyncio.Task[None]] = {}
        self.started_at = int(time.time())
        """Seconds since 1970."""

    def report(self) -> Report:
        """The state as known by now; asks nobody."""
        models: dict[str, str | None] = {}
        for pipeline in self._catalog.pipelines:
            name = pipeline.served_model_name
            # Without the server no model answers, whatever it did a moment ago.
            models[name] = models.get(name) or self._reason or self._fault(pipeline)
        failed = {p.served_model_name for p in self._catalog.pipelines if p.name in self._failures}
        reason = "this gateway is stopping" if self._drain.has_begun else self._reason
        return Report(models, frozenset(failed), reason)

    async def watch(self) -> None:
        """Looks at the models for ever, more often while one of them does not answer."""
        try:
            while True:
                await self._look()
                is_ready = self.report().is_ready
                await asyncio.sleep(
                    self._interval_s if is_ready else min(_RETRY_INTERVAL_S, self._interval_s)
                )
        finally:
            for canary in self._canaries.values():
                canary.cancel()

    async def _look(self) -> None:
        """Refreshes the list of models, and sends a canary to each that has none under way: none
        waits for another.
        """
        reason = None
        try:
            async with asyncio.timeout(_LIST_TIMEOUT_S):
                pipelines = await self._catalog.refresh()
            if not pipelines:
                reason = "the server has no models; add one with: triton-embeddings add"
            for pipeline in pipelines:
                running = self._canaries.get(pipeline.name)
                if running is None or running.done():
                    self._canaries[pipeline.name] = asyncio.create_task(self._ask(pipeline))
        except GatewayError as error:
            reason = error.message
        except TimeoutError:
            reason = f"the inference server did not list its models within {_LIST_TIMEOUT_S:g} s"
        except Exception:
            logger.exception("the look at the models failed")
            reason = "an unexpected error; the gateway's log tells what it was"
        if reason is not None and self._reason is None:
            logger.warning("%s", reason)
        self._reason = reason

    async def _ask(self, pipeline: Pipeline) -> None:
        last = self._inference.last_success(pipeline)
        is_fresh = last is not None and time.monotonic() - last < self._interval_s
        if is_fresh and pipeline.name not in self._failures:
            return
        reason = await self._fault_of_canary(pipeline)
        if reason is None:
            if self._failures.pop(pipeline.name, None) is not None:
                logger.info("%s answers again", pipeline.served_model_name)
            return
        if pipeline.name not in self._failures:
            logger.warning("%s does not answer: %s", pipeline.served_model_name, reason)
        self._failures[pipeline.name] = reason

    async def _fault_of_canary(self, pipeline: Pipeline) -> str | None:
        """Asks for everything that the model serves; why that failed, or None.

        Of what images need, texts ask everything but the image stage.
        """
        outputs = [name for task in sorted(pipeline.tasks) for name in TASK_OUTPUTS[task]]
        try:
            async with asyncio.timeout(self._patience_s):
                await self._inference.infer(
                    pipeline, [_CANARY], outputs, {RequestParameter.TRUNCATION: "right"}
                )
                if pipeline.takes_images:
                    image = Content(b"", (_IMAGE_CANARY,))
                    await self._inference.infer(pipeline, [image], (IMAGE_GRID,), {}, stage="image")
        except GatewayError as error:
            return error.message
        except TimeoutError:
            return f"no answer in {self._patience_s:g} s"
        except Exception:
            logger.exception("the canary of %s failed", pipeline.served_model_name)
            return "an unexpected error; the gateway's log tells what it was"
        return None

    def _fault(self, pipeline: Pipeline) -> str | None:
        if (fault := self._stage_fault(pipeline)) is not None:
            return fault
        if pipeline.name in self._failures:
            return self._failures[pipeline.name]
        last = self._inference.last_success(pipeline)
        if last is None:
            return "it has not answered yet"
        age = time.monotonic() - last
        return None if age < self._patience_s else f"its last answer was {age:.0f} s ago"
