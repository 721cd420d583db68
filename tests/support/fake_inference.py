"""An inference server without a server: every item's embedding is made from its bytes."""

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from backends.contract import (
    DECODED,
    DENSE,
    IMAGE_GRID,
    INPUT_IDS,
    IS_SPECIAL,
    LOGITS,
    N_TOKENS,
    SPARSE_COUNT,
    SPARSE_INDICES,
    SPARSE_WEIGHTS,
    TOKEN_EMBEDDINGS,
    TOKEN_IDS,
    TOKEN_SPANS,
    TOKEN_TEXTS,
    TOKEN_VECTORS,
    TRUNCATED,
    VECTOR_COUNT,
    ErrorCode,
    Task,
)
from gateway.batches import Content, Item, size
from gateway.errors import GatewayError, RefusedItem
from gateway.pipeline import Pipeline

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


KINDS = Pipeline(
    name="m3",
    served_model_name="org/m3",
    tasks=frozenset({Task.EMBED, Task.SPARSE, Task.COLBERT, Task.TOKENS}),
    family="xlm_roberta",
    dimensions=8,
    max_length=16,
    max_batch_size=4,
    max_batch_tokens=64,
    checkpoint="hub:org/m3@abc",
    pooling="cls",
)
"""A model with every head for embeddings."""
ROLES = replace(
    KINDS, name="late", served_model_name="org/late", tasks=frozenset({Task.COLBERT}), has_roles=True
)
RERANKER = replace(
    PIPELINE,
    name="reranker",
    served_model_name="org/reranker",
    tasks=frozenset({Task.SCORE, Task.CLASSIFY}),
    dimensions=None,
    labels=("LABEL_0",),
    score_activation="sigmoid",
    label_activation="sigmoid",
)
CLASSIFIER = replace(
    RERANKER,
    name="classifier",
    served_model_name="org/classifier",
    tasks=frozenset({Task.CLASSIFY}),
    labels=("good", "bad", "ugly"),
    score_activation="identity",
    label_activation="softmax",
)


MULTIMODAL = replace(
    PIPELINE,
    name="gme",
    served_model_name="org/gme",
    takes_images=True,
    fuses=True,
    max_image_tokens=4,
    # A quarter of it is for items with images.
    max_batch_tokens=4 * PIPELINE.max_batch_tokens,
    takes_instructions=True,
)
"""A model that embeds a text and images as one."""
TOWERS = replace(MULTIMODAL, name="clip", served_model_name="org/clip", fuses=False, takes_instructions=False)
"""A model that embeds a text or an image."""


BROKEN = b"broken"
"""In an image file: it is refused."""


class FakeInference:
    """Answers at once; `fault` makes every call fail, and an image that says so is refused."""

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
        if stage == "tokenizer":
            return self._tokenizer(items, parameters)
        if LOGITS in outputs:
            return self._logits(pipeline, items, outputs)
        self._look(pipeline, items)
        if stage == "image":
            return {IMAGE_GRID: np.ones((len(items), 1, 3), np.int32)}
        role = str(parameters.get("role", "")).encode()
        rows = {
            DENSE: np.stack([vector(item, parameters.get("dimensions", 8)) for item in items]),
            N_TOKENS: np.array([[size(item)] for item in items], np.int32),
            TRUNCATED: np.array(
                [[len(item.text if isinstance(item, Content) else item) > 16] for item in items]
            ),
        }
        if set(outputs) <= set(rows):
            return {name: rows[name] for name in outputs}
        rows |= {
            # One index for each letter; its weight is how often it is there.
            SPARSE_INDICES: [np.array(sorted(set(item)), np.int32) for item in items],
            SPARSE_WEIGHTS: [
                np.array([item.count(c) for c in sorted(set(item))], np.float32) for item in items
            ],
            SPARSE_COUNT: np.array([[len(set(item))] for item in items], np.int32),
            # One vector for each letter.
            TOKEN_VECTORS: [np.stack([vector(bytes([c]) + role) for c in item]) for item in items],
            VECTOR_COUNT: np.array([[len(item)] for item in items], np.int32),
            TOKEN_EMBEDDINGS: [np.stack([vector(bytes([c])) for c in item]) for item in items],
            TOKEN_IDS: [np.frombuffer(item, np.uint8).astype(np.int32) for item in items],
        }
        return {name: rows[name] for name in outputs}

    def _look(self, pipeline, items):
        """What the image stage does with files that it cannot read."""
        for i, item in enumerate(items):
            if isinstance(item, Content):
                assert pipeline.takes_images, "an image was sent to a model of texts"
                if any(BROKEN in image for image in item.images):
                    raise RefusedItem("the image cannot be read", item=i, reason=ErrorCode.INVALID_IMAGE)

    def _logits(self, pipeline, items, outputs):
        """Of a pair the letters that both have; of a text its length, its length but one, and so on."""
        sizes = [len(item) if isinstance(item, bytes) else sum(map(len, item)) for item in items]
        firsts = [
            len(item) if isinstance(item, bytes) else len(set(item[0]) & set(item[1])) for item in items
        ]
        rows = {
            LOGITS: np.array([[n - i for i in range(len(pipeline.labels))] for n in firsts], np.float32),
            N_TOKENS: np.array([[size] for size in sizes], np.int32),
            TRUNCATED: np.array([[size > 16] for size in sizes]),
        }
        return {name: rows[name] for name in outputs}

    def _tokenizer(self, items, parameters):
        if parameters.get("text_format") == "ids":
            ids = [np.frombuffer(item, "<i4") for item in items]
            return {
                TOKEN_TEXTS: [[_text_of(c).lower().encode() for c in row] for row in ids],
                DECODED: np.array([["".join(map(_text_of, row)).encode()] for row in ids], object),
            }
        return {
            INPUT_IDS: [list(item) for item in items],
            TOKEN_TEXTS: [[chr(c).encode() for c in item] for item in items],
            IS_SPECIAL: [[i == 0 for i in range(len(item))] for item in items],
            TOKEN_SPANS: [[(i, i + 1) for i in range(len(item))] for item in items],
        }

    def last_success(self, pipeline: Pipeline) -> float | None:
        return self._last.get(pipeline.name)

    async def close(self) -> None:
        self.is_closed = True


def _text_of(token: int) -> str:
    """A letter for every id, the real one for those of letters."""
    return chr(token % 0xD800)


def vector(item: Item, dimensions: int = 8) -> np.ndarray:
    parts = (b"image", item.text, *item.images) if isinstance(item, Content) else (item,)
    digest = np.frombuffer(hashlib.sha256(b"|".join(parts)).digest(), np.uint32)[:dimensions]
    return (digest / 2**32).astype(np.float32)
