"""The tasks that endpoints ask for, in terms of the contract with the server. Knows neither HTTP nor gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Collection, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from backends.contract import (
    ACCOUNT_OUTPUTS,
    DECODED,
    DENSE,
    INPUT_IDS,
    IS_SPECIAL,
    LOGITS,
    N_TOKENS,
    SPARSE_INDICES,
    SPARSE_WEIGHTS,
    TASK_OUTPUTS,
    TOKEN_DTYPE,
    TOKEN_EMBEDDINGS,
    TOKEN_IDS,
    TOKEN_SPANS,
    TOKEN_TEXTS,
    TOKEN_VECTORS,
    TRUNCATED,
    RequestParameter,
    Task,
)
from gateway.batches import Array, Item
from gateway.context import count_tokens
from gateway.errors import BadRequest, RefusedItem, ServerFault
from gateway.inference import Inference
from gateway.pipeline import Pipeline

Result = TypeVar("Result")


@dataclass(frozen=True)
class Items:
    """The inputs of a request, as they travel in the tensors `text` and `image`."""

    elements: Sequence[Item]
    has_ids: bool = False

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> Items:
        """Texts as UTF-8."""
        return cls([text.encode() for text in texts])

    @classmethod
    def of_pairs(cls, pairs: Iterable[tuple[str, str]]) -> Items:
        """Pairs of texts as UTF-8."""
        # A query that goes with many documents is there once.
        encode = lru_cache(maxsize=None)(str.encode)
        return cls([(encode(first), encode(second)) for first, second in pairs])

    @classmethod
    def of_ids(cls, rows: Sequence[Sequence[int]]) -> Items:
        """Token ids below 2**31."""
        return cls([np.array(row, TOKEN_DTYPE).tobytes() for row in rows], has_ids=True)


@dataclass(frozen=True)
class TextOptions:
    """What a request may say about its texts; None leaves it to the model."""

    prompt_name: str | None = None
    prompt: str | None = None
    instruction: str | None = None
    """What a query is for."""
    truncation: str | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    role: str | None = None
    """query or document."""
    top_k: int | None = None
    """Keep so many of the largest sparse weights."""
    max_tokens: int | None = None
    """Of a whole text or pair, where that is less than the model takes."""
    max_query_tokens: int | None = None
    """Of the first text of a pair."""
    max_document_tokens: int | None = None
    """Of the second."""


@dataclass(frozen=True)
class SparseVector:
    """Weights of some tokens."""

    indices: Array
    """int32 [k], ascending."""
    weights: Array
    """float32 [k]."""


@dataclass(frozen=True)
class Representations:
    """What a model makes of texts and images, as far as it was asked for."""

    n_tokens: Array
    """int32 [n], special tokens included."""
    is_truncated: Array
    """bool [n]."""
    dense: Array | None = None
    """float32 [n, d]."""
    sparse: list[SparseVector] | None = None
    colbert: list[Array] | None = None
    """float32 [v, d] of each text."""
    tokens: list[Array] | None = None
    """float32 [t, h] of each text."""
    token_ids: list[Array] | None = None
    """int32 [t] of each text."""

    def part(self, start: int, stop: int) -> Representations:
        """Some neighbouring texts of them."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        cut: dict[str, Any] = {n: None if value is None else value[start:stop] for n, value in given.items()}
        return Representations(**cut)


async def represent(
    inference: Inference,
    pipeline: Pipeline,
    items: Items,
    tasks: Collection[Task],
    options: TextOptions,
    field: str = "",
) -> Representations:
    """Everything that the tasks ask of items, from one pass of the encoder. Raises GatewayError.

    `field` is what the client calls the items, where it is not what others of its dialect do.
    """
    outputs = [name for task in tasks for name in TASK_OUTPUTS[task]]
    with _naming_fields((field, len(items.elements))):
        rows: dict[str, Any] = await inference.infer(
            pipeline, items.elements, [*outputs, *ACCOUNT_OUTPUTS], _parameters(items, options)
        )
    count_tokens(int(rows[N_TOKENS].sum()))
    sparse = None
    if Task.SPARSE in tasks:
        pairs = zip(rows[SPARSE_INDICES], rows[SPARSE_WEIGHTS], strict=True)
        sparse = [SparseVector(indices, weights) for indices, weights in pairs]
    return Representations(
        n_tokens=rows[N_TOKENS][:, 0],
        is_truncated=rows[TRUNCATED][:, 0],
        dense=rows.get(DENSE),
        sparse=sparse,
        colbert=rows.get(TOKEN_VECTORS),
        tokens=rows.get(TOKEN_EMBEDDINGS),
        token_ids=rows.get(TOKEN_IDS),
    )


@dataclass(frozen=True)
class Side:
    """One of the two lists of a comparison."""

    items: Items
    field: str
    """What the client calls it."""
    max_tokens: int | None = None
    """Of one text, where the client asks for less than the model takes."""


async def represent_sides(
    inference: Inference,
    pipeline: Pipeline,
    left: Side,
    right: Side,
    tasks: Collection[Task],
    options: TextOptions,
    *,
    has_roles: bool | None = None,
) -> tuple[Representations, Representations]:
    """Both sides of a comparison, in one batch.

    Where the sides are queries and documents they go to the model as such: those of a model that encodes them
    differently do, unless `has_roles` says otherwise, and with an instruction all do, which is for the left
    side. Raises GatewayError.
    """
    has_roles = pipeline.has_roles if has_roles is None else has_roles
    has_roles = has_roles or options.instruction is not None
    if has_roles or options.truncation == "document" or left.max_tokens or right.max_tokens:
        both = await _all_or_none(
            [
                _represent_side(
                    inference,
                    pipeline,
                    side,
                    tasks,
                    replace(
                        options,
                        role=role if has_roles else None,
                        instruction=options.instruction if role == "query" else None,
                        truncation=_truncation_of(role, options.truncation),
                        max_tokens=side.max_tokens,
                    ),
                )
                for side, role in ((left, "query"), (right, "document"))
            ]
        )
        return both[0], both[1]
    joined = Items([*left.items.elements, *right.items.elements], left.items.has_ids)
    count = len(left.items.elements)
    with _naming_fields((left.field, count), (right.field, len(right.items.elements))):
        whole = await represent(inference, pipeline, joined, tasks, options)
    return whole.part(0, count), whole.part(count, len(joined.elements))


async def _all_or_none(works: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """What several works give; where one fails the others end, for nobody waits for them."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _truncation_of(role: str, truncation: str | None) -> str | None:
    """Where documents only are to be cut, a query that is over the limit is refused."""
    return {"query": "error", "document": "right"}[role] if truncation == "document" else truncation


async def _represent_side(
    inference: Inference,
    pipeline: Pipeline,
    side: Side,
    tasks: Collection[Task],
    options: TextOptions,
) -> Representations:
    return await represent(inference, pipeline, side.items, tasks, options, side.field)


@contextmanager
def _naming_fields(*fields: tuple[str, int]) -> Iterator[None]:
    """Says of a refused item in which of the client's lists it is, given those lists' lengths end to end."""
    try:
        yield
    except RefusedItem as error:
        if error.item is None:
            raise
        item = error.item
        for field, length in fields:
            if item < length:
                raise RefusedItem(error.message, item=item, reason=error.reason, field=field) from error
            item -= length
        raise


@dataclass(frozen=True)
class Classified:
    """What a classifier or a reranker says of texts or pairs."""

    logits: Array
    """float32 [n, labels]."""
    n_tokens: Array
    """int32 [n]."""
    is_truncated: Array
    """bool [n]."""


async def classify(
    inference: Inference, pipeline: Pipeline, items: Items, options: TextOptions, field: str
) -> Classified:
    """Logits of texts or pairs, which the client calls `field`. Raises GatewayError."""
    outputs = (*TASK_OUTPUTS[Task.CLASSIFY], *ACCOUNT_OUTPUTS)
    with _naming_fields((field, len(items.elements))):
        rows: dict[str, Any] = await inference.infer(
            pipeline, items.elements, outputs, _parameters(items, options)
        )
    count_tokens(int(rows[N_TOKENS].sum()))
    if not np.isfinite(rows[LOGITS]).all():
        raise ServerFault(
            f"the model {pipeline.served_model_name} gave numbers that are not finite: its checkpoint may be "
            "broken, or its dtype too narrow"
        )
    return Classified(rows[LOGITS], rows[N_TOKENS][:, 0], rows[TRUNCATED][:, 0])


@dataclass(frozen=True)
class Token:
    """One token of a text, as a person looks at it."""

    id: int
    text: str
    is_special: bool
    start: int
    """Characters of the text, from and to; equal for special tokens."""
    stop: int


async def tokenize(
    inference: Inference, pipeline: Pipeline, items: Items, options: TextOptions, *, add_special_tokens: bool
) -> list[list[Token]]:
    """The tokens of texts. Raises GatewayError."""
    parameters = _parameters(items, options)
    parameters[RequestParameter.ADD_SPECIAL_TOKENS] = add_special_tokens
    outputs = (INPUT_IDS, TOKEN_TEXTS, TOKEN_SPANS, IS_SPECIAL, N_TOKENS)
    rows: dict[str, Any] = await inference.infer(
        pipeline, items.elements, outputs, parameters, stage="tokenizer"
    )
    columns = zip(rows[INPUT_IDS], rows[TOKEN_TEXTS], rows[IS_SPECIAL], rows[TOKEN_SPANS], strict=True)
    return [
        [
            Token(int(token), text.decode(), bool(special), int(span[0]), int(span[1]))
            for token, text, special, span in zip(*column, strict=True)
        ]
        for column in columns
    ]


async def decode(
    inference: Inference, pipeline: Pipeline, items: Items, *, skip_special_tokens: bool
) -> list[str]:
    """Lists of token ids -> texts. Raises GatewayError."""
    parameters = {
        **_parameters(items, TextOptions()),
        RequestParameter.SKIP_SPECIAL_TOKENS: skip_special_tokens,
    }
    with _naming_fields(("ids", len(items.elements))):
        rows: dict[str, Any] = await inference.infer(
            pipeline, items.elements, (DECODED,), parameters, stage="tokenizer"
        )
    return [row[0].decode() for row in rows[DECODED]]


def _parameters(items: Items, options: TextOptions) -> dict[str, Any]:
    parameters = {
        RequestParameter.PROMPT_NAME: options.prompt_name,
        RequestParameter.PROMPT: options.prompt,
        RequestParameter.INSTRUCTION: options.instruction,
        RequestParameter.TRUNCATION: options.truncation,
        RequestParameter.DIMENSIONS: options.dimensions,
        RequestParameter.NORMALIZE: options.normalize,
        RequestParameter.ROLE: options.role,
        RequestParameter.TOP_K: options.top_k,
        RequestParameter.MAX_TOKENS: options.max_tokens,
        RequestParameter.MAX_QUERY_TOKENS: options.max_query_tokens,
        RequestParameter.MAX_DOCUMENT_TOKENS: options.max_document_tokens,
        RequestParameter.TEXT_FORMAT: "ids" if items.has_ids else None,
    }
    for name, value in parameters.items():
        if isinstance(value, str) and "\0" in value:
            # The server hands parameters on as C strings: the rest would be lost without a word.
            raise BadRequest(
                f"{name} holds a NUL character, which cannot be sent on; leave it out", param=name
            )
    return {name: value for name, value in parameters.items() if value is not None}
