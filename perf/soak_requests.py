"""What the clients of soak.py ask: every kind of model, every kind of answer."""

import base64
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import server

from tests.support import checkpoints, multimodal

# What a fault that is being mended, or too much work, may be told.
_OF_FAULTS = frozenset({429, 503})
_TEXT = "the value of this class is returned by the query"
_RERANK = {"query": "the value of it", "documents": [_TEXT, "others do not", "a query"]}


@dataclass(frozen=True)
class Request:
    """A body, and the statuses that are right for it."""

    path: str
    body: dict[str, Any]
    statuses: frozenset[int] = frozenset({200}) | _OF_FAULTS
    name: str = field(default="", kw_only=True)
    """Of one that is always the same."""


def _refused(path: str, body: dict[str, Any], status: int) -> Request:
    return Request(path, body, frozenset({status}) | _OF_FAULTS)


def _image(seed: int) -> str:
    file = multimodal.encoded(multimodal.picture(90, 60, seed))
    return "data:image/png;base64," + base64.b64encode(file).decode()


def tiny_models(folder: Path) -> Iterator[Path]:
    """A checkpoint of each kind."""
    yield checkpoints.bge_m3(folder / "bge-m3")
    yield checkpoints.splade(folder / "splade")
    yield checkpoints.classifier(folder / "reranker", checkpoints.bert)
    yield checkpoints.classifier(folder / "topics", checkpoints.distilbert, 3, ("good", "bad", "ugly"))
    yield multimodal.clip(folder / "clip")


CHECKED = [
    Request("/v1/embeddings", {"model": server.NAME, "input": _TEXT}, name="dense"),
    Request("/v1/embeddings/sparse", {"model": "splade", "input": _TEXT}, name="splade"),
    Request(
        "/v1/embeddings/hybrid",
        {"model": "bge-m3", "input": [_TEXT], "outputs": ["dense", "sparse", "colbert"]},
        name="hybrid",
    ),
    Request("/v1/rerank", {"model": "reranker", **_RERANK}, name="rerank"),
    Request("/v1/classify", {"model": "topics", "input": [_TEXT, "others"]}, name="classify"),
    Request("/v1/embeddings", {"model": "clip", "input": [{"image": _image(1)}, "a value"]}, name="clip"),
]
"""Whose answers must stay the same."""


def draw(chance: random.Random, texts: list[str]) -> Request:
    """One of them, or another."""
    one, some = chance.choice(texts), chance.choices(texts, k=chance.randint(2, 64))
    plain = {"model": server.NAME, "truncate": True}
    requests: list[tuple[Request, float]] = [
        *((request, 1) for request in CHECKED),
        (Request("/v1/embeddings", {**plain, "input": one}), 6),
        (Request("/v1/embeddings", {**plain, "input": some, "encoding_format": "base64"}), 3),
        (Request("/embed", {"model": "bge-m3", "inputs": some[:16], "truncate": True}), 2),
        (Request("/embed_all", {"model": "bge-m3", "inputs": one, "truncate": True}), 1),
        (Request("/v1/rerank", {"model": "reranker", "query": one[:60], "documents": some}), 1),
        (Request("/v1/classify", {"model": "topics", "input": some[:8], "truncate": True}), 1),
        (Request("/v1/embeddings", {"model": "clip", "input": [{"image": _image(chance.randrange(9))}]}), 1),
        (Request("/tokenize", {"model": server.NAME, "inputs": one}), 2),
        (_refused("/v1/embeddings", {"model": server.NAME, "input": one * 40}, 400), 1),
        (_refused("/v1/embeddings", {"model": server.NAME, "input": []}, 400), 1),
        (_refused("/v1/embeddings", {"input": one, "model": f"nobody-{chance.random()}"}, 404), 1),
    ]
    return chance.choices([r for r, _ in requests], [weight for _, weight in requests])[0]


def is_right(found: Any, expected: Any) -> bool:
    """Whether two answers are the same, numbers but for rounding; what is each answer's own is left out."""
    if isinstance(expected, dict):
        names = expected.keys() - {"id", "created", "usage"}
        return all(name in found and is_right(found[name], expected[name]) for name in names)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(is_right, found, expected))
    if isinstance(expected, float):
        return bool(np.isclose(found, expected, atol=1e-4))
    return bool(found == expected)
