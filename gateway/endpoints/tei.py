"""The routes of Hugging Face's text-embeddings-inference, so that its clients work unchanged.

A bare list cannot say that a text was cut: the header x-truncated-inputs does.

*Source:* huggingface/text-embeddings-inference 1.9, its OpenAPI document and router/src/http/types.rs.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StrictBool

from backends.contract import Task
from gateway import classes, reranking
from gateway.answers import truncated_header
from gateway.batches import size
from gateway.classes import PredictRequest
from gateway.endpoints.dialect import Dialect, Services, describe, services
from gateway.error_bodies import TEI
from gateway.errors import (
    BadRequest,
    BodyTooLarge,
)
from gateway.inputs import SIDES, Strings, TextFields, text_options
from gateway.items import Texts, read_items
from gateway.pipeline import Pipeline
from gateway.reranking import RerankRequest
from gateway.similarity import cosine_scores
from gateway.tasks import (
    Representations,
    Side,
    SparseVector,
    Token,
    decode,
    represent,
    represent_sides,
    tokenize,
)
from gateway.wire import check, in_turns, matrix, parse, read, read_bytes, respond

router = APIRouter()


class EmbedRequest(TextFields):
    """The body of /embed, /embed_sparse and /embed_all."""

    inputs: Texts
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = None

    def fields(self) -> TextFields:
        """The same in the words of the other dialects; a direction alone does not ask for truncation."""
        side = SIDES[self.truncation_direction] if self.truncation_direction and self.truncate else None
        return self.model_copy(update={"truncation_side": side})


class _Sides(BaseModel):
    source_sentence: str
    sentences: Strings


class _SimilarityParameters(BaseModel):
    model_config = ConfigDict(extra="ignore")

    truncate: StrictBool | None = None
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = None
    prompt_name: str | None = None
    instruction: str | None = None


class SimilarityRequest(BaseModel):
    """The body of /similarity."""

    model_config = ConfigDict(extra="ignore")

    inputs: _Sides
    parameters: _SimilarityParameters | None = Field(None, description="They may also stand beside inputs.")
    model: str | None = None
    truncate: StrictBool | None = None
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = None
    prompt_name: str | None = None
    instruction: str | None = None


class TokenizeRequest(TextFields):
    """The body of /tokenize."""

    inputs: Texts
    add_special_tokens: StrictBool = True


class DecodeRequest(BaseModel):
    """The body of /decode."""

    model_config = ConfigDict(extra="ignore")

    ids: Any = Field(validation_alias=AliasChoices("ids", "inputs"))
    skip_special_tokens: StrictBool = True
    model: str | None = None


_REFUSAL = {"error": "`inputs` cannot be empty", "error_type": "Empty"}
_TEXTS = {"inputs": ["Hello, world", "Good morning"]}


@router.post(
    "/embed",
    summary="Dense embeddings",
    openapi_extra=describe(EmbedRequest.model_json_schema(), _TEXTS, [[0.5, -0.5], [0.5, 0.5]], _REFUSAL),
)
async def embed(request: Request) -> Response:
    """One vector for each text, as a bare list."""
    own = services(request)
    return await _embed(own, await read(request, EmbedRequest, own.settings.max_body_bytes))


@router.post(
    "/embed_sparse",
    summary="Sparse embeddings",
    openapi_extra=describe(
        EmbedRequest.model_json_schema(), _TEXTS, [[{"index": 7592, "value": 0.9}]], _REFUSAL
    ),
)
async def embed_sparse(request: Request) -> Response:
    """Weights of tokens for each text, as a bare list."""
    own = services(request)
    return await _embed_sparse(own, await read(request, EmbedRequest, own.settings.max_body_bytes))


@router.post(
    "/embed_all",
    summary="Every token's vector",
    openapi_extra=describe(EmbedRequest.model_json_schema(), _TEXTS, [[[0.5, -0.5], [0.5, 0.5]]], _REFUSAL),
)
async def embed_all(request: Request) -> Response:
    """The encoder's own vector of every token, special tokens included."""
    own = services(request)
    body = await read(request, EmbedRequest, own.settings.max_body_bytes)
    made = await _represent(own, body, Task.TOKENS)
    return respond([await matrix(rows) for rows in made.tokens or ()], headers=_truncated(made))


@router.post(
    "/similarity",
    summary="Cosine similarity",
    openapi_extra=describe(
        SimilarityRequest.model_json_schema(),
        {"inputs": {"source_sentence": "Hello", "sentences": ["Hi", "Good morning"]}},
        [0.83, 0.61],
        _REFUSAL,
    ),
)
async def similarity(request: Request) -> Response:
    """Of one sentence to each of several, as a bare list."""
    own = services(request)
    return await _similarity(own, await read(request, SimilarityRequest, own.settings.max_body_bytes))


@router.post(
    "/tokenize",
    summary="The tokens of texts",
    openapi_extra=describe(
        TokenizeRequest.model_json_schema(),
        _TEXTS,
        [[{"id": 7592, "text": "Hello", "special": False, "start": 0, "stop": 5}]],
        _REFUSAL,
    ),
)
async def tokenize_texts(request: Request) -> Response:
    """Ids, texts and places of tokens."""
    own = services(request)
    body = await read(request, TokenizeRequest, own.settings.max_body_bytes)
    items = read_items(body.inputs, own.settings, "inputs")
    count, most = sum(map(size, items.elements)), own.settings.max_tokenize_bytes
    if count > most:
        raise BodyTooLarge(
            f"inputs has {count} bytes of text; at most {most} are tokenised at once (the operator can raise "
            "the limit with GATEWAY_MAX_TOKENIZE_BYTES)",
            param="inputs",
        )
    if items.has_ids:
        raise BadRequest(
            "inputs holds token ids; /tokenize takes texts, and /decode takes ids", param="inputs"
        )
    pipeline = await own.catalog.find(body.model)
    rows = await tokenize(
        own.inference,
        pipeline,
        items,
        text_options(body, pipeline, [Task.EMBED, Task.SPARSE]),
        add_special_tokens=body.add_special_tokens,
    )
    return respond(await in_turns(rows, lambda row: [_token(token) for token in row], each=1))


@router.post(
    "/decode",
    summary="The texts of token ids",
    openapi_extra=describe(DecodeRequest.model_json_schema(), {"ids": [101, 7592, 102]}, ["hello"], _REFUSAL),
)
async def decode_ids(request: Request) -> Response:
    """One text for each list of ids."""
    own = services(request)
    body = await read(request, DecodeRequest, own.settings.max_body_bytes)
    items = read_items(body.ids, own.settings, "ids")
    if not items.has_ids:
        raise BadRequest("ids holds texts; /decode takes token ids, and /tokenize takes texts", param="ids")
    pipeline = await own.catalog.find(body.model)
    return respond(await decode(own.inference, pipeline, items, skip_special_tokens=body.skip_special_tokens))


@router.get("/info", summary="The model that answers")
async def info(request: Request, model: str | None = None) -> Response:
    """The first model, or the one named by ?model=, with the limits that hold here."""
    own = services(request)
    pipeline = await own.catalog.find(model)
    settings = own.settings
    commit = pipeline.checkpoint.partition("@")[2]
    return respond(
        {
            "model_id": pipeline.served_model_name,
            "model_sha": commit or None,
            "model_dtype": pipeline.dtype,
            "served_model_name": pipeline.served_model_name,
            "model_type": _model_type(pipeline),
            "max_concurrent_requests": None,
            "max_input_length": pipeline.max_length,
            "max_batch_tokens": pipeline.max_batch_tokens,
            "max_batch_requests": pipeline.max_batch_size,
            "max_client_batch_size": settings.max_items,
            "auto_truncate": pipeline.truncation != "error",
            "tokenization_workers": 1,
            "version": importlib.metadata.version("triton-embeddings"),
            "sha": None,
            "docker_label": None,
        }
    )


@router.post("/", include_in_schema=False)
@router.post("/invocations", include_in_schema=False)
async def answer(request: Request) -> Response:
    """What clients send to the bare address: the task follows from the body, then from the model."""
    own = services(request)
    content = parse(await read_bytes(request, own.settings.max_body_bytes))
    if content.get("texts") is not None:
        ranked = check(RerankRequest, content)
        _, hits = await reranking.rerank(
            own.scorer, reranking.tei_request(ranked), own.settings.max_documents, field="texts"
        )
        rows, headers = reranking.tei_rows(ranked, hits)
        return respond(rows, headers=headers)
    if isinstance(content.get("inputs"), dict):
        return await _similarity(own, check(SimilarityRequest, content))
    body = check(EmbedRequest, content)
    named = await own.catalog.find(body.model)
    known = [named] if body.model else own.catalog.pipelines
    if not any({Task.EMBED, Task.SPARSE} & pipeline.tasks for pipeline in known):
        rows, headers = await classes.predict(
            own.inference,
            own.catalog,
            own.calculator,
            check(PredictRequest, {**(content.get("parameters") or {}), **content}),
            own.settings.max_documents,
        )
        return respond(rows, headers=headers)
    # A dense model answers if there is one.
    if not any(Task.EMBED in pipeline.tasks for pipeline in known):
        return await _embed_sparse(own, body)
    return await _embed(own, body)


def _model_type(pipeline: Pipeline) -> dict[str, Any]:
    if Task.CLASSIFY not in pipeline.tasks:
        return {"embedding": {"pooling": _pooling(pipeline)}}
    labels = {
        "id2label": {str(i): name for i, name in enumerate(pipeline.labels)},
        "label2id": {name: i for i, name in enumerate(pipeline.labels)},
    }
    return {"reranker" if Task.SCORE in pipeline.tasks else "classifier": labels}


def _pooling(pipeline: Pipeline) -> str:
    """text-embeddings-inference's word for what a model gives first."""
    if Task.EMBED in pipeline.tasks:
        return pipeline.pooling or "none"
    return (
        "splade" if Task.SPARSE in pipeline.tasks else "colbert" if Task.COLBERT in pipeline.tasks else "none"
    )


async def _embed(own: Services, body: EmbedRequest) -> Response:
    # Unlike the other routes, this one promises unit length unless asked otherwise.
    normalized = body if body.normalize is not None else body.model_copy(update={"normalize": True})
    made = await _represent(own, normalized, Task.EMBED)
    assert made.dense is not None
    return respond(np.ascontiguousarray(made.dense), headers=_truncated(made))


async def _embed_sparse(own: Services, body: EmbedRequest) -> Response:
    made = await _represent(own, body, Task.SPARSE)
    rows = await in_turns(made.sparse or (), _sparse_pairs)
    return respond(rows, headers=_truncated(made))


def _sparse_pairs(vector: SparseVector) -> list[dict[str, Any]]:
    pairs = zip(vector.indices.tolist(), vector.weights.tolist(), strict=True)
    return [{"index": index, "value": value} for index, value in pairs]


async def _represent(own: Services, body: EmbedRequest, task: Task) -> Representations:
    items = read_items(body.inputs, own.settings, "inputs")
    pipeline = await own.catalog.find(body.model, task)
    return await represent(
        own.inference, pipeline, items, [task], text_options(body.fields(), pipeline, [task])
    )


async def _similarity(own: Services, body: SimilarityRequest) -> Response:
    left = Side(read_items([body.inputs.source_sentence], own.settings, "source_sentence"), "source_sentence")
    right = Side(read_items(body.inputs.sentences, own.settings, "sentences"), "sentences")
    pipeline = await own.catalog.find(body.model, Task.EMBED)
    beside = body.model_dump(include=set(_SimilarityParameters.model_fields), exclude_none=True)
    within = body.parameters.model_dump(exclude_none=True) if body.parameters else {}
    fields = EmbedRequest(inputs=None, **{**beside, **within}).fields()
    options = text_options(fields, pipeline, [Task.EMBED])
    sides = await represent_sides(own.inference, pipeline, left, right, [Task.EMBED], options)
    scores = cosine_scores(*(side.dense for side in sides if side.dense is not None))
    return respond(scores[0], headers=_truncated(*sides, names=("source", "")))


def _token(token: Token) -> dict[str, Any]:
    start, stop = (None, None) if token.is_special else (token.start, token.stop)
    return {
        "id": token.id,
        "text": token.text,
        "special": token.is_special,
        "start": start,
        "stop": stop,
    }


def _truncated(*made: Representations, names: tuple[str, ...] = ("",)) -> dict[str, str]:
    """The places of texts that were cut; a list with a name is told by its name."""
    places = [
        name or str(place)
        for one, name in zip(made, names, strict=True)
        for place in np.flatnonzero(one.is_truncated).tolist()
    ]
    return truncated_header(places)


DIALECT = Dialect(router, TEI)
