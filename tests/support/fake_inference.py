"""An inference server without a server: every text's embedding is made from its bytes."""

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from backends.contract import DENSE, N_TOKENS, TRUNCATED, Task
from gateway.errors import GatewayError
from gateway.inference import Pipeline

PIPELINE = Pipeline(
    name="tiny",
    served_model_name="org/tiny",
    tasks=frozenset({Task.EMBED}),
    family="bert",
    dimensions=8,
    max_length=16,
    max_batch_size=4,
    max_batch_tokens=64,
)


class FakeInference:
    """Answers at once; `fault` makes every call fail."""

    def __init__(self, pipelines: Sequence[Pipeline] = (PIPELINE,)) -> None:
        self.known = list(pipelines)
        self.fault: GatewayError | None = None
        self.calls: list[tuple[Sequence[bytes], Mapping[str, Any]]] = []
        self.is_closed = False
        self.release = asyncio.Event()
        self.release.set()
        self._last: dict[str, float] = {}

    async def pipelines(self) -> list[Pipeline]:
        if self.fault is not None:
            raise self.fault
        return self.known

    async def infer(self, pipeline, items, outputs, parameters, stage=None):
        self.calls.append((items, dict(parameters)))
        await self.release.wait()
        if self.fault is not None:
            raise self.fault
        self._last[pipeline.name] = time.monotonic()
        rows = {
            DENSE: np.stack([vector(item, parameters.get("dimensions", 8)) for item in items]),
            N_TOKENS: np.array([[len(item)] for item in items], np.int32),
            TRUNCATED: np.array([[len(item) > 16] for item in items]),
        }
        return {name: rows[name] for name in outputs}

    def last_success(self, pipeline: Pipeline) -> float | None:
        return self._last.get(pipeline.name)

    async def close(self) -> None:
        self.is_closed = True


def vector(item: bytes, dimensions: int = 8) -> np.ndarray:
    digest = np.frombuffer(hashlib.sha256(item).digest(), np.uint32)[:dimensions]
    return (digest / 2**32).astype(np.float32)
