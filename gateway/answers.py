"""Representations of texts as several dialects write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import orjson

from gateway.batches import Array
from gateway.tasks import Classified, Representations, SparseVector
from gateway.wire import matrix, to_base64


def usage(*made: Representations | Classified) -> dict[str, int]:
    """OpenAI's account of tokens."""
    return usage_of(sum(int(one.n_tokens.sum()) for one in made))


def usage_of(count: int) -> dict[str, int]:
    """The same of a count of tokens."""
    return {"prompt_tokens": count, "total_tokens": count}


def usage_header(used: dict[str, int]) -> dict[str, str]:
    """Where RTP-LLM tells of the usage besides the body."""
    return {"USAGE": orjson.dumps(used).decode()}


def truncated_header(places: Iterable[int | str]) -> dict[str, str]:
    """Tells which texts were cut, where the answer is a bare list that cannot; nothing for none."""
    told = ",".join(map(str, places))
    return {"x-truncated-inputs": told} if told else {}


def sparse_pairs(vector: SparseVector) -> dict[str, Array]:
    """The form that vector databases take."""
    return {"indices": vector.indices, "values": vector.weights}


async def embedding_items(
    made: Representations, kind: str, names: Mapping[str, str], *, is_base64: bool
) -> list[dict[str, Any]]:
    """One object for each text, with all that was made of it.

    `kind` is its `object`; `names` says under which name a representation stands if not under its own. With
    base64, vectors are little-endian float32 numbers, and those of tokens come with their shape.
    """
    items: list[dict[str, Any]] = [{"object": kind, "index": i} for i in range(len(made.n_tokens))]
    if made.dense is not None:
        for item, row in zip(items, np.ascontiguousarray(made.dense), strict=True):
            item[names.get("dense", "dense")] = to_base64(row) if is_base64 else row
    for item, vector in zip(items, made.sparse or (), strict=False):
        item[names.get("sparse", "sparse")] = sparse_pairs(vector)
    for item, vectors in zip(items, made.colbert or (), strict=False):
        item[names.get("colbert", "colbert")] = await vectors_of(vectors, is_base64=is_base64)
    mark_truncated(items, made)
    return items


async def vectors_of(vectors: Array, *, is_base64: bool) -> Any:
    """Vectors [v, d] of one text as JSON will have them; in base64 with their shape."""
    return {"shape": vectors.shape, "data": to_base64(vectors)} if is_base64 else await matrix(vectors)


def mark_truncated(items: list[dict[str, Any]], made: Representations) -> None:
    """Says of every text that was cut that it was."""
    for i in np.flatnonzero(made.is_truncated).tolist():
        items[i]["truncated"] = True
