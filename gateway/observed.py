"""An inference that counts what goes through it, for the request that asks; canaries are nobody's request."""

from __future__ import annotations

import time
from collections.abc import Sequence

from backends.contract import N_TOKENS, TRUNCATED
from gateway import metrics, phases
from gateway.batches import Answer, Item
from gateway.context import current
from gateway.inference import Inference
from gateway.pipeline import Pipeline
from gateway.server_calls import Parameters


class Observed:
    """Stands before another inference."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def pipelines(self) -> list[Pipeline]:
        return await self._inference.pipelines()

    def last_success(self, pipeline: Pipeline) -> float | None:
        return self._inference.last_success(pipeline)

    async def close(self) -> None:
        await self._inference.close()

    async def infer(
        self,
        pipeline: Pipeline,
        items: Sequence[Item],
        outputs: Sequence[str],
        parameters: Parameters,
        stage: str | None = None,
    ) -> dict[str, Answer]:
        context = current()
        if context is None:
            return await self._inference.infer(pipeline, items, outputs, parameters, stage)
        model = context.model = pipeline.served_model_name
        context.phases.setdefault(phases.RECEIVE, time.monotonic() - context.received_at)
        answers = await self._inference.infer(pipeline, items, outputs, parameters, stage)
        context.answered_at = time.monotonic()
        if N_TOKENS in answers:
            metrics.TOKENS.labels(model).inc(sum(int(row[0]) for row in answers[N_TOKENS]))
        if TRUNCATED in answers:
            metrics.TRUNCATED_INPUTS.labels(model).inc(sum(bool(row[0]) for row in answers[TRUNCATED]))
        return answers
