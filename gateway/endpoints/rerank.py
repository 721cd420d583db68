"""Reranking in everybody's shape: RTP-LLM, Voyage, Cohere, Jina, vLLM, text-embeddings-inference, SGLang.

They share paths, so the body tells them apart: `texts` is text-embeddings-inference's and gets a bare list,
`instruct` is SGLang's and gets one too; everything else gets an object that holds what all the others read. A
model without a reranking head answers by the similarity of its embeddings.

*Source:* the API references of Cohere v1 and v2, Jina and Voyage, and what their clients read; RTP-LLM
4b8d39cd5, vLLM 0.13, SGLang and text-embeddings-inference 1.9 for their own.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from gateway import error_bodies
from gateway.endpoints.dialect import Dialect, describe, services, speak
from gateway.errors import BadRequest
from gateway.inputs import MAX_INT, SIDES, read_text, read_texts
from gateway.kinds import read_weights
from gateway.scoring import Scores
from gateway.tasks import TextOptions
from gateway.wire import check, parse, read_bytes, respond

router = APIRouter()

_SIDE = Literal["left", "right", "Left", "Right"]


class RerankRequest(BaseModel):
    """The body of all routes; fields of other servers are ignored, null means absent."""

    model_config = ConfigDict(extra="ignore")

    query: Any = Field(description='A text, as a string or as {"text": ...}.')
    documents: Any = Field(None, description='A list of texts, as strings or as {"text": ...}.')
    texts: Any = Field(None, description="The documents, as text-embeddings-inference calls them.")
    model: str | None = Field(None, description="May be left out: the first reranker answers then.")
    top_n: StrictInt | None = Field(None, ge=0, le=MAX_INT, description="Give so many; 0 is all.")
    top_k: StrictInt | None = Field(None, ge=0, le=MAX_INT, description="The same, in Voyage's words.")
    sorted: StrictBool | None = Field(
        None, description="Best first (the default), or in the order of the request."
    )
    return_documents: StrictBool | None = None
    return_text: StrictBool | None = None
    rank_fields: list[str] | None = Field(
        None, description="Fields of a document that is an object; text without."
    )
    normalize: StrictBool | None = Field(None, description="Scores between 0 and 1, or raw logits.")
    raw_scores: StrictBool | None = Field(None, description="The opposite.")
    use_activation: StrictBool | None = Field(None, description="As the checkpoint says, or raw logits.")
    truncation: StrictBool | None = Field(None, description="Cut what is over the limit, or refuse it.")
    truncate: StrictBool | None = None
    truncation_side: _SIDE | None = None
    truncation_direction: _SIDE | None = None
    truncate_only_documents: StrictBool | None = Field(
        None, description="Cut the document only, not whichever text is longer."
    )
    max_tokens_per_query: StrictInt | None = Field(None, ge=1, le=MAX_INT)
    max_tokens_per_doc: StrictInt | None = Field(None, ge=1, le=MAX_INT)
    weights: dict[str, float] | list[float] | None = Field(
        None, description="For models without a reranking head: of dense, sparse and colbert similarity."
    )


@dataclass(frozen=True)
class Hit:
    """One document of an answer."""

    index: int
    score: float
    text: str
    is_truncated: bool


_QUESTION = {"query": "coffee", "documents": ["Starbuck", "Luckin", "Peets Coffee"]}
_ANSWER = {
    "id": "rerank-5f1c",
    "object": "list",
    "model": "bge-reranker",
    "results": [{"index": 2, "relevance_score": 0.97, "document": {"text": "Peets Coffee"}}],
    "usage": {"prompt_tokens": 24, "total_tokens": 24},
    "meta": {"api_version": {"version": "1"}, "billed_units": {"search_units": 1}},
}
_REFUSAL = {"message": "documents is an empty list; send at least one text"}
_DESCRIPTION = describe(RerankRequest.model_json_schema(), _QUESTION, _ANSWER, _REFUSAL)
_RTP_LLM_DESCRIPTION = describe(
    RerankRequest.model_json_schema(),
    _QUESTION,
    {
        "results": [{"index": 2, "relevance_score": 3.4, "document": "Peets Coffee"}],
        "total_tokens": 24,
        "model": "bge-reranker",
    },
    {"error_code": 507, "error_code_str": "507_ERROR_INPUT_FORMAT_ERROR", **_REFUSAL},
)


@router.post("/v1/reranker", summary="Rerank, RTP-LLM's shape", openapi_extra=_RTP_LLM_DESCRIPTION)
async def rerank_rtp_llm(request: Request) -> Response:
    """Raw logits, unless `normalize` is true; documents as strings."""
    speak(request, error_bodies.RTP_LLM)
    content = parse(await read_bytes(request, services(request).settings.max_body_bytes))
    if "texts" in content:
        return await _rerank_texts(request, content)
    body = check(RerankRequest, content)
    scores, hits = await _rank(request, body, default_activation="identity")
    results = []
    for hit in hits:
        row: dict[str, Any] = {"index": hit.index, "relevance_score": hit.score}
        if body.return_documents is not False:
            row["document"] = hit.text
        results.append(_marked(row, hit))
    return respond({"results": results, "total_tokens": scores.n_tokens, "model": await _name(request, body)})


@router.post("/infinity/rerank", summary="Rerank, infinity's shape", openapi_extra=_DESCRIPTION)
@router.post("/rerank", summary="Rerank", openapi_extra=_DESCRIPTION)
@router.post(
    "/v1/rerank", summary="Rerank, the shapes of Cohere, Jina, Voyage, vLLM", openapi_extra=_DESCRIPTION
)
async def rerank(request: Request) -> Response:
    """Scores as the checkpoint makes them.

    `texts` gets text-embeddings-inference's answer, `instruct` SGLang's.
    """
    content = parse(await read_bytes(request, services(request).settings.max_body_bytes))
    if "texts" in content:
        return await _rerank_texts(request, content)
    body = check(RerankRequest, content)
    scores, hits = await _rank(request, body)
    if "instruct" in content:
        return respond([_marked(_sglang_row(hit, body), hit) for hit in hits])
    answer = await _answer(request, body, scores, hits, is_document_default=True)
    if not request.url.path.startswith("/v1/"):
        # infinity's client insists on its own word.
        answer["object"] = "rerank"
    if request.url.path.startswith("/infinity/"):
        # And LiteLLM's for infinity on documents as strings, where its other clients insist on objects.
        answer["results"] = [
            {**row, "document": hit.text} if "document" in row else row
            for row, hit in zip(answer["results"], hits, strict=True)
        ]
    if "top_k" in content or "truncation" in content:
        # Voyage's clients read `data`, and documents as strings.
        answer["data"] = [
            {**row, "document": hit.text} if "document" in row else row
            for row, hit in zip(answer["results"], hits, strict=True)
        ]
    return respond(answer)


@router.post("/v2/rerank", summary="Rerank, Cohere's second shape", openapi_extra=_DESCRIPTION)
async def rerank_cohere(request: Request) -> Response:
    """Without documents in the answer, unless `return_documents` is true."""
    body = check(RerankRequest, parse(await read_bytes(request, services(request).settings.max_body_bytes)))
    scores, hits = await _rank(request, body)
    answer = await _answer(request, body, scores, hits, is_document_default=False)
    answer["meta"]["api_version"]["version"] = "2"
    return respond(answer)


async def _rerank_texts(request: Request, content: Mapping[str, Any]) -> Response:
    """text-embeddings-inference: a bare list, all of it, sigmoid unless raw_scores."""
    speak(request, error_bodies.TEI)
    body = check(RerankRequest, content)
    body = body.model_copy(update={"documents": body.texts, "raw_scores": bool(body.raw_scores)})
    _, hits = await _rank(request, body, field="texts", truncates=None)
    rows = [
        {"index": hit.index, "score": hit.score, **({"text": hit.text} if body.return_text else {})}
        for hit in hits
    ]
    places = sorted(hit.index for hit in hits if hit.is_truncated)
    return respond(rows, headers={"x-truncated-inputs": ",".join(map(str, places))} if places else {})


def _sglang_row(hit: Hit, body: RerankRequest) -> dict[str, Any]:
    document = {} if body.return_documents is False else {"document": hit.text}
    return {"score": hit.score, **document, "index": hit.index, "meta_info": {}}


async def _answer(
    request: Request, body: RerankRequest, scores: Scores, hits: Sequence[Hit], *, is_document_default: bool
) -> dict[str, Any]:
    has_documents = is_document_default if body.return_documents is None else body.return_documents
    results = []
    for hit in hits:
        row: dict[str, Any] = {"index": hit.index, "relevance_score": hit.score}
        if has_documents:
            row["document"] = {"text": hit.text}
        results.append(_marked(row, hit))
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "object": "list",
        "model": await _name(request, body),
        "results": results,
        "usage": {"prompt_tokens": scores.n_tokens, "total_tokens": scores.n_tokens},
        "meta": {
            "api_version": {"version": "1"},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": scores.n_tokens},
        },
    }


def _marked(row: dict[str, Any], hit: Hit) -> dict[str, Any]:
    return {**row, "truncated": True} if hit.is_truncated else row


async def _name(request: Request, body: RerankRequest) -> str:
    return body.model or (await services(request).scorer.find(None)).served_model_name


async def _rank(
    request: Request,
    body: RerankRequest,
    *,
    default_activation: str | None = None,
    field: str = "documents",
    truncates: bool | None = True,
) -> tuple[Scores, list[Hit]]:
    """The scores of all documents, and those that are asked for, in their order."""
    own = services(request)
    query = read_text(body.query, "query")
    if body.documents is None:
        raise BadRequest(f"the field {field} is missing", param=field)
    documents = read_texts(body.documents, own.settings.max_documents, field, body.rank_fields)
    pipeline = await own.scorer.find(body.model)
    weights = read_weights(body.weights)
    scores = await own.scorer.rank(
        pipeline, query, documents, _options(body, truncates), _activation(body, default_activation), weights
    )
    order = np.arange(len(documents))
    if body.sorted is not False:
        # Stable: documents with the same score keep their order.
        order = np.argsort(-scores.values, kind="stable")
    most = body.top_n or body.top_k or len(documents)
    hits = [
        Hit(int(i), float(scores.values[i]), documents[i], bool(scores.is_truncated[i])) for i in order[:most]
    ]
    return scores, hits


def _activation(body: RerankRequest, default: str | None) -> str | None:
    if body.normalize is not None:
        return "sigmoid" if body.normalize else "identity"
    if body.raw_scores is not None:
        return "identity" if body.raw_scores else "sigmoid"
    if body.use_activation is not None:
        return None if body.use_activation else "identity"
    return default


def _options(body: RerankRequest, truncates: bool | None) -> TextOptions:
    """Rerankers cut what is over the limit, as everybody's do, unless they are told not to."""
    asked = body.truncation if body.truncation is not None else body.truncate
    wanted = truncates if asked is None else asked
    side = body.truncation_side or body.truncation_direction
    truncation = None
    if wanted is False:
        truncation = "error"
    elif wanted:
        truncation = "document" if body.truncate_only_documents else SIDES[side or "right"]
    return TextOptions(
        truncation=truncation,
        max_query_tokens=body.max_tokens_per_query,
        max_document_tokens=body.max_tokens_per_doc,
    )


DIALECT = Dialect(router, error_bodies.RERANK)
