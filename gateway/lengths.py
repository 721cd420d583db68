"""Limits of single texts, whatever route they came by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backends.contract import ErrorCode
from gateway.batches import Answer, Item, text_size
from gateway.errors import BadRequest, RefusedItem
from gateway.inference import Inference
from gateway.pipeline import Pipeline
from gateway.server_calls import Parameters


@dataclass(frozen=True)
class BoundedInference:
    """Another inference, which no text over the limits reaches: it would be copied a few times on its way."""

    inference: Inference
    max_text_bytes: int
    max_prompt_bytes: int

    async def pipelines(self) -> list[Pipeline]:
        return await self.inference.pipelines()

    async def infer(
        self,
        pipeline: Pipeline,
        items: Sequence[Item],
        outputs: Sequence[str],
        parameters: Parameters,
        stage: str | None = None,
    ) -> dict[str, Answer]:
        for name, value in parameters.items():
            # A text has at least as many bytes as characters.
            if isinstance(value, str) and len(value) > self.max_prompt_bytes // 4:
                self._check_prompt(name, value)
        for i, item in enumerate(items):
            size = text_size(item)
            if size > self.max_text_bytes:
                raise RefusedItem(
                    f"the text has {size} bytes; at most {self.max_text_bytes} are taken (the operator can "
                    "raise the limit with GATEWAY_MAX_TEXT_BYTES)",
                    item=i,
                    reason=ErrorCode.INVALID_INPUT,
                )
        return await self.inference.infer(pipeline, items, outputs, parameters, stage)

    def last_success(self, pipeline: Pipeline) -> float | None:
        return self.inference.last_success(pipeline)

    async def close(self) -> None:
        await self.inference.close()

    def _check_prompt(self, name: str, value: str) -> None:
        size = len(value.encode())
        if size > self.max_prompt_bytes:
            raise BadRequest(
                f"{name} has {size} bytes; at most {self.max_prompt_bytes} are taken, for it goes with every "
                "text (the operator can raise the limit with GATEWAY_MAX_PROMPT_BYTES)",
                param=name,
            )
