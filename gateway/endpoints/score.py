"""vLLM's scores of pairs: one text against several, or two lists row by row.

*Source:* vLLM 0.13, entrypoints/pooling/score.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from gateway import error_bodies
from gateway.answers import usage_of
from gateway.endpoints.dialect import Dialect, describe, services
from gateway.errors import BadRequest
from gateway.inputs import MAX_INT, Numbers, read_instruction, read_limit, read_texts
from gateway.kinds import read_weights
from gateway.tasks import TextOptions
from gateway.wire import read, respond

router = APIRouter()


class ScoreRequest(BaseModel):
    """The body of /score."""

    model_config = ConfigDict(extra="ignore")

    queries: Any = None
    text_1: Any = None
    data_1: Any = None
    query: Any = None
    documents: Any = None
    items: Any = None
    text_2: Any = None
    data_2: Any = None
    model: str | None = None
    use_activation: StrictBool | None = None
    truncate: StrictBool | None = None
    truncation_side: Literal["left", "right"] | None = None
    truncate_prompt_tokens: StrictInt | None = Field(None, ge=-1, le=MAX_INT)
    instruction: str | None = None
    instruct: str | None = None
    max_tokens_per_query: StrictInt | None = Field(None, ge=1, le=MAX_INT)
    max_tokens_per_doc: StrictInt | None = Field(None, ge=1, le=MAX_INT)
    label_token_ids: Any = None
    weights: dict[str, float] | Numbers | None = None


_SCHEMA = {
    "type": "object",
    "required": ["text_1", "text_2"],
    "properties": {
        "text_1": {"description": "A text, or a list. Also: queries, data_1."},
        "text_2": {"description": "A text, or a list. Also: documents, items, data_2."},
        "model": {"type": "string"},
        "instruction": {"type": "string", "description": "What the first text is for, as in /v1/rerank."},
        "use_activation": {"type": "boolean", "description": "false gives raw logits."},
        "truncate_prompt_tokens": {
            "type": "integer",
            "description": "Cut a pair to so many tokens; -1: the limit.",
        },
    },
}


@router.post(
    "/v1/score",
    summary="Score pairs",
    openapi_extra=describe(
        _SCHEMA,
        {"text_1": "what is a panda?", "text_2": ["a bear", "a car"]},
        {
            "id": "score-5f1c",
            "object": "list",
            "created": 1764000000,
            "model": "bge-reranker",
            "data": [{"index": 0, "object": "score", "score": 0.93}],
            "usage": {"prompt_tokens": 18, "total_tokens": 18},
        },
        {"error": {"message": "text_1 has 2 texts and text_2 has 3; give one, or as many"}},
    ),
)
@router.post("/score", include_in_schema=False)
async def score(request: Request) -> Response:
    """One against several, or row by row, in the order of the request."""
    own = services(request)
    body = await read(request, ScoreRequest, own.settings.max_body_bytes)
    if body.label_token_ids is not None:
        raise BadRequest(
            "label_token_ids are not served: a reranker that answers in words has its own; leave them out",
            param="label_token_ids",
        )
    name, value = _first_given(body, ("queries", "text_1", "data_1", "query"))
    first = read_texts(value, own.settings.max_documents, name)
    field, value = _first_given(body, ("documents", "items", "text_2", "data_2"))
    second = read_texts(value, own.settings.max_documents, field)
    if len(first) not in (1, len(second)):
        raise BadRequest(
            f"{name} has {len(first)} texts and {field} has {len(second)}; give one text and several, or "
            "two lists of one length",
            param=name,
        )
    pipeline = await own.scorer.find(body.model)
    truncation = None
    if body.truncate is False:
        truncation = "error"
    elif body.truncate or body.truncation_side or body.truncate_prompt_tokens is not None:
        truncation = body.truncation_side or "right"
    options = TextOptions(
        instruction=read_instruction(body.instruction, body.instruct, pipeline),
        truncation=truncation,
        max_query_tokens=body.max_tokens_per_query,
        max_document_tokens=body.max_tokens_per_doc,
        max_tokens=read_limit(body.truncate_prompt_tokens),
    )
    activation = "identity" if body.use_activation is False else None
    weights, names = read_weights(body.weights), (name, field)
    if len(first) == 1:
        scores = await own.scorer.rank(pipeline, first[0], second, options, activation, weights, names)
    else:
        pairs = list(zip(first, second, strict=True))
        scores = await own.scorer.score(pipeline, pairs, options, activation, weights, names)
    data: list[dict[str, Any]] = [
        {"index": i, "object": "score", "score": value} for i, value in enumerate(scores.values.tolist())
    ]
    for i in scores.is_truncated.nonzero()[0].tolist():
        data[i]["truncated"] = True
    return respond(
        {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model or pipeline.served_model_name,
            "data": data,
            "usage": usage_of(scores.n_tokens),
        }
    )


def _first_given(body: ScoreRequest, names: tuple[str, ...]) -> tuple[str, Any]:
    """The first of some names of one thing that the request has, and its value. Raises BadRequest."""
    for name in names:
        value = getattr(body, name)
        if value is not None:
            return name, value
    raise BadRequest(f"one of the fields {', '.join(names)} is missing", param=names[0])


DIALECT = Dialect(router, error_bodies.OPENAI)
