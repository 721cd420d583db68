"""RTP-LLM's routes for BGE-M3 and its like: one kind of embedding each, and similarity.

Its answers and its error bodies, with HTTP statuses that tell who is at fault (it answers 500 to everything).

*Source:* alibaba/rtp-llm at 4b8d39cd5, rtp_llm/models/downstream_modules/embedding and
frontend/frontend_app.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, StrictBool

from backends.contract import Task
from gateway.answers import mark_truncated, usage, usage_header, vectors_of
from gateway.drafts import load_items
from gateway.endpoints.dialect import Dialect, Services, describe, services
from gateway.error_bodies import RTP_LLM
from gateway.errors import BadRequest
from gateway.inputs import Numbers, TextFields, text_options
from gateway.items import InputFields, Inputs, read_drafts, read_inputs
from gateway.kinds import DEFAULT_WEIGHTS, kinds_to_tasks, read_weights
from gateway.pipeline import Pipeline
from gateway.scoring import check_products, kinds_of
from gateway.similarity import mixed_scores
from gateway.tasks import Representations, Side, SparseVector, represent, represent_sides
from gateway.wire import in_turns, read, respond, to_base64

router = APIRouter()

_KINDS = Literal["dense", "sparse", "colbert", "hybrid"]


class EmbeddingRequest(InputFields):
    """The body of the routes of one kind each."""

    encoding_format: Literal["float", "base64"] | None = None


class SparseRequest(EmbeddingRequest):
    """The body of POST /v1/embeddings/sparse."""

    return_decoded: StrictBool | None = Field(
        None, description="Tokens as their texts (the default), or as their ids."
    )


class _EmbeddingConfig(BaseModel):
    type: _KINDS | None = None


class SimilarityRequest(TextFields):
    """The body of POST /v1/embeddings/similarity."""

    left: Inputs
    right: Inputs
    type: _KINDS | None = Field(None, description="Without it dense, if the model has it.")
    embedding_config: _EmbeddingConfig | None = Field(None, description="RTP-LLM's way to say the type.")
    weights: dict[str, float] | Numbers | None = Field(
        None, description="Of a hybrid, by kind or as a list: dense, sparse, colbert. Default: 0.4, 0.2, 0.4."
    )
    return_response: StrictBool | None = Field(None, description="Give the embeddings, too.")


_REFUSAL = {
    "error_code": 507,
    "error_code_str": "507_ERROR_INPUT_FORMAT_ERROR",
    "message": "input[0] is an empty string; leave it out, or send some text",
}


def _examples(kind: str, embedding: Any) -> tuple[Any, Any, Any]:
    answer = {
        "object": "list",
        "data": [{"object": kind, "embedding": embedding, "index": 0}],
        "model": "bge-m3",
        "usage": {"prompt_tokens": 10, "total_tokens": 10},
    }
    return {"input": ["Hello, what's your name"]}, answer, _REFUSAL


@router.post(
    "/v1/embeddings/dense",
    summary="Dense embeddings",
    openapi_extra=describe(
        EmbeddingRequest.model_json_schema(), *_examples("embedding", [0.5, -0.5, 0.5, 0.5])
    ),
)
async def create_dense_embeddings(request: Request) -> Response:
    """One vector for each text."""
    return await _create(request, EmbeddingRequest, "dense")


@router.post(
    "/v1/embeddings/sparse",
    summary="Sparse embeddings",
    openapi_extra=describe(
        SparseRequest.model_json_schema(), *_examples("sparse_embedding", {"Hello": 0.15, "name": 0.24})
    ),
)
async def create_sparse_embeddings(request: Request) -> Response:
    """Weights of tokens: by their texts, or by their ids."""
    return await _create(request, SparseRequest, "sparse")


@router.post(
    "/v1/embeddings/colbert",
    summary="ColBERT embeddings",
    openapi_extra=describe(
        EmbeddingRequest.model_json_schema(), *_examples("colbert_embedding", [[0.6, 0.8], [1.0, 0.0]])
    ),
)
async def create_colbert_embeddings(request: Request) -> Response:
    """A vector of unit length for each token."""
    return await _create(request, EmbeddingRequest, "colbert")


@router.post(
    "/v1/embeddings/similarity",
    summary="Scores between two lists of texts",
    openapi_extra=describe(
        SimilarityRequest.model_json_schema(),
        {"left": ["hello, what is your name?"], "right": ["hello", "what is your name"]},
        {"model": "bge-m3", "similarity": [[0.81, 0.87]], "left_response": None, "right_response": None},
        _REFUSAL,
    ),
)
async def compare(request: Request) -> Response:
    """Every left text against every right text: dense, sparse, ColBERT (the mean of the best
    matches), or a mix.
    """
    own = services(request)
    body = await read(request, SimilarityRequest, own.settings.max_body_bytes)
    lists = [read_drafts(body.left, own.settings, "left"), read_drafts(body.right, own.settings, "right")]
    if lists[0].items.has_ids != lists[1].items.has_ids:
        raise BadRequest("one of left and right holds texts and the other token ids; send both alike")
    asked = _type(body)
    weights: dict[str, float] = {}
    if asked is not None:
        mixed = read_weights(body.weights) or DEFAULT_WEIGHTS
        weights = mixed if asked == "hybrid" else {asked: 1.0}
    needs = lists[0].needs | lists[1].needs
    pipeline = await own.catalog.find(body.model, *kinds_to_tasks(weights), needs=needs)
    if not weights:
        pipeline = pipeline if kinds_of(pipeline) else await own.catalog.find(body.model, Task.EMBED)
        weights = {kinds_of(pipeline)[0]: 1.0}
    tasks = kinds_to_tasks(weights)
    options = text_options(body, pipeline, tasks)
    left, right = await load_items(own.images, own.catalog, pipeline, *lists)
    sides = await represent_sides(
        own.inference, pipeline, Side(left, "left"), Side(right, "right"), tasks, options
    )
    check_products([sides], own.settings.max_products)
    loop = asyncio.get_running_loop()
    scores = await loop.run_in_executor(own.calculator, mixed_scores, *sides, weights)
    model = body.model or pipeline.served_model_name
    answer: dict[str, Any] = {
        "model": model,
        "similarity": scores,
        "left_response": None,
        "right_response": None,
    }
    cut = {
        side: made.is_truncated.nonzero()[0].tolist()
        for side, made in zip(("left", "right"), sides, strict=True)
    }
    if any(cut.values()):
        answer["truncated"] = cut
    if body.return_response:
        for name, made in zip(("left_response", "right_response"), sides, strict=True):
            answers = [await _response(own, pipeline, made, kind, model) for kind in weights]
            answer[name] = answers[0] if len(answers) == 1 else dict(zip(weights, answers, strict=True))
    return _respond(answer, usage(*sides))


def _type(body: SimilarityRequest) -> str | None:
    """What a request says in either of the two places; weights alone ask for a hybrid. Raises BadRequest."""
    configured = body.embedding_config.type if body.embedding_config else None
    if body.type and configured and body.type != configured:
        raise BadRequest(
            f"type is {body.type!r}, and embedding_config.type is {configured!r}; give one of them",
            param="type",
        )
    asked = body.type or configured
    if body.weights is not None and asked not in (None, "hybrid"):
        raise BadRequest(f"weights are for the type hybrid, and type is {asked!r}", param="weights")
    return "hybrid" if body.weights is not None else asked


async def _create(request: Request, model: type[EmbeddingRequest], kind: str) -> Response:
    own = services(request)
    body = await read(request, model, own.settings.max_body_bytes)
    drafts, body = read_inputs(body, own.settings)
    tasks = kinds_to_tasks([kind])
    pipeline = await own.catalog.find(body.model, *tasks, needs=drafts.needs)
    options = text_options(body, pipeline, tasks)
    (items,) = await load_items(own.images, own.catalog, pipeline, drafts)
    made = await represent(own.inference, pipeline, items, tasks, options, drafts.field)
    is_decoded = not (isinstance(body, SparseRequest) and body.return_decoded is False)
    answer = await _response(
        own,
        pipeline,
        made,
        kind,
        body.model or pipeline.served_model_name,
        is_decoded=is_decoded,
        is_base64=body.encoding_format == "base64",
    )
    return _respond(answer, usage(made))


async def _response(
    own: Services,
    pipeline: Pipeline,
    made: Representations,
    kind: str,
    model: str,
    *,
    is_decoded: bool = True,
    is_base64: bool = False,
) -> dict[str, Any]:
    """The answer of the route of one kind."""
    if kind == "dense":
        assert made.dense is not None
        rows = np.ascontiguousarray(made.dense)
        embeddings: list[Any] = [to_base64(row) for row in rows] if is_base64 else list(rows)
        name = "embedding"
    elif kind == "sparse":
        embeddings = await _sparse_maps(own, pipeline, made, is_decoded=is_decoded)
        name = "sparse_embedding"
    else:
        embeddings = [await vectors_of(vectors, is_base64=is_base64) for vectors in made.colbert or ()]
        name = "colbert_embedding"
    data = [{"object": name, "embedding": one, "index": i} for i, one in enumerate(embeddings)]
    mark_truncated(data, made)
    return {"object": "list", "data": data, "model": model, "usage": usage(made)}


async def _sparse_maps(
    own: Services, pipeline: Pipeline, made: Representations, *, is_decoded: bool
) -> list[Any]:
    vectors = made.sparse or []
    if not is_decoded:
        return await in_turns(vectors, lambda vector: dict(zip(*_pairs(vector, str), strict=True)))
    ids = np.unique(np.concatenate([vector.indices for vector in vectors]))
    texts = await own.vocabulary.texts(pipeline, ids.tolist())

    def read(vector: SparseVector) -> dict[str, float]:
        weights: dict[str, float] = {}
        for text, weight in zip(*_pairs(vector, texts.__getitem__), strict=True):
            # Two ids may read the same, with and without a blank before: the larger weight stays.
            weights[text] = max(weight, weights.get(text, 0.0))
        return weights

    return await in_turns(vectors, read)


def _pairs(vector: SparseVector, name: Callable[[int], str]) -> tuple[list[str], list[float]]:
    return [name(token) for token in vector.indices.tolist()], vector.weights.tolist()


def _respond(answer: dict[str, Any], used: dict[str, int]) -> Response:
    return respond(answer, headers=usage_header(used))


DIALECT = Dialect(router, RTP_LLM)
