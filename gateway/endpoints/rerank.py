"""Reranking in everybody's shape: RTP-LLM, Voyage, Cohere, Jina, vLLM, text-embeddings-inference, SGLang.

They share paths, so the body tells them apart: `texts` is text-embeddings-inference's and gets a bare list,
an `instruct` is SGLang's and gets one too; everything else gets an object that holds what all the others
read. A model without a reranking head answers by the similarity of its embeddings.

*Source:* the API references of Cohere v1 and v2, Jina and Voyage, and what their clients read; RTP-LLM
4b8d39cd5, vLLM 0.13, SGLang and text-embeddings-inference 1.9 for their own.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from gateway import error_bodies, reranking
from gateway.answers import usage_header, usage_of
from gateway.endpoints.dialect import Dialect, describe, services, speak, speaking
from gateway.reranking import Hit, Ranking, RerankRequest
from gateway.wire import check, parse, read_bytes, respond

router = APIRouter()

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
@speaking(error_bodies.RTP_LLM)
async def rerank_rtp_llm(request: Request) -> Response:
    """Raw logits, unless `normalize` is true or the model is made to give a probability; documents as
    strings.
    """
    body, _ = await _read(request)
    if body.documents is None and body.texts is not None:
        return await _rerank_texts(request, body)
    ranking, hits = await _rank(request, body, prefers_logits=True)
    results = []
    for hit in hits:
        row: dict[str, Any] = {"index": hit.index, "relevance_score": hit.score}
        if body.return_documents is not False:
            row["document"] = hit.text
        results.append(_marked(row, hit))
    return respond(
        {"results": results, "total_tokens": ranking.n_tokens, "model": ranking.model},
        headers=usage_header(usage_of(ranking.n_tokens)),
    )


@router.post("/infinity/rerank", summary="Rerank, infinity's shape", openapi_extra=_DESCRIPTION)
@router.post("/rerank", summary="Rerank", openapi_extra=_DESCRIPTION)
@router.post(
    "/v1/rerank", summary="Rerank, the shapes of Cohere, Jina, Voyage, vLLM", openapi_extra=_DESCRIPTION
)
async def rerank(request: Request) -> Response:
    """Scores as the checkpoint makes them.

    `texts` gets text-embeddings-inference's answer, `instruct` SGLang's.
    """
    body, content = await _read(request)
    if body.documents is None and body.texts is not None:
        return await _rerank_texts(request, body)
    ranking, hits = await _rank(request, body)
    if content.get("instruct") is not None:
        return respond([_marked(_sglang_row(hit, body), hit) for hit in hits])
    answer = _answer(body, ranking, hits, is_document_default=True)
    if not request.url.path.startswith("/v1/"):
        # infinity's client insists on its own word.
        answer["object"] = "rerank"
    if request.url.path.startswith("/infinity/"):
        # And LiteLLM's for infinity on documents as strings, where its other clients insist on objects.
        answer["results"] = _with_strings(answer["results"], hits)
    if "top_k" in content or "truncation" in content:
        # Voyage's clients read `data`, and documents as strings.
        answer["data"] = _with_strings(answer["results"], hits)
    return respond(answer)


@router.post("/v2/rerank", summary="Rerank, Cohere's second shape", openapi_extra=_DESCRIPTION)
async def rerank_cohere(request: Request) -> Response:
    """Without documents in the answer, unless `return_documents` is true."""
    body, _ = await _read(request)
    ranking, hits = await _rank(request, body)
    answer = _answer(body, ranking, hits, is_document_default=False)
    answer["meta"]["api_version"]["version"] = "2"
    return respond(answer)


async def _read(request: Request) -> tuple[RerankRequest, dict[str, Any]]:
    """The body, and what it was read from: a field that is there and null counts for Voyage only."""
    content = parse(await read_bytes(request, services(request).settings.max_body_bytes))
    if content.get("documents") is None and content.get("texts") is not None:
        speak(request, error_bodies.TEI)
    return check(RerankRequest, content), content


async def _rank(request: Request, body: RerankRequest, **options: Any) -> tuple[Ranking, list[Hit]]:
    own = services(request)
    return await reranking.rerank(own.scorer, body, own.settings.max_documents, **options)


async def _rerank_texts(request: Request, body: RerankRequest) -> Response:
    """text-embeddings-inference's answer: a bare list of all."""
    _, hits = await _rank(request, reranking.tei_request(body), field="texts")
    rows, headers = reranking.tei_rows(body, hits)
    return respond(rows, headers=headers)


def _with_strings(rows: list[dict[str, Any]], hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """The same with documents as strings."""
    return [
        {**row, "document": hit.text} if "document" in row else row
        for row, hit in zip(rows, hits, strict=True)
    ]


def _sglang_row(hit: Hit, body: RerankRequest) -> dict[str, Any]:
    document = {} if body.return_documents is False else {"document": hit.text}
    return {"score": hit.score, **document, "index": hit.index, "meta_info": {}}


def _answer(
    body: RerankRequest, ranking: Ranking, hits: Sequence[Hit], *, is_document_default: bool
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
        "model": ranking.model,
        "results": results,
        "usage": usage_of(ranking.n_tokens),
        "meta": {
            "api_version": {"version": "1"},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": ranking.n_tokens},
        },
    }


def _marked(row: dict[str, Any], hit: Hit) -> dict[str, Any]:
    return {**row, "truncated": True} if hit.is_truncated else row


DIALECT = Dialect(router, error_bodies.RERANK)
