"""Classification in the shapes of RTP-LLM, vLLM and SGLang, infinity, and text-embeddings-inference.

*Source:* RTP-LLM 4b8d39cd5 downstream_modules/classifier; vLLM 0.13 entrypoints/pooling/classify; infinity
0.0.78 fastapi_schemas; text-embeddings-inference 1.9 router/src/http/types.rs.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from backends.contract import Task
from gateway import classes, error_bodies
from gateway.answers import truncated_header, usage, usage_header
from gateway.batches import Array
from gateway.classes import PredictRequest
from gateway.endpoints.dialect import Dialect, Services, describe, services, speaking
from gateway.errors import BadRequest, EmptyInput
from gateway.inputs import MAX_INT, read_instruction, read_limit
from gateway.pipeline import Pipeline
from gateway.scoring import activate
from gateway.tasks import Classified, TextOptions
from gateway.wire import check, in_turns, matrix, parse, read, read_bytes, respond

router = APIRouter()


class ClassifyRequest(BaseModel):
    """The body of all routes but /predict."""

    model_config = ConfigDict(extra="ignore")

    input: Any = Field(description="A text, or a list of texts or of pairs of texts.")
    model: str | None = None
    instruction: str | None = Field(None, description="Of pairs, as in /v1/rerank.")
    instruct: str | None = None
    truncate: StrictBool | None = None
    truncation: StrictBool | None = None
    truncate_prompt_tokens: StrictInt | None = Field(None, ge=-1, le=MAX_INT)
    raw_scores: StrictBool | None = Field(
        None, description="infinity's answer: a list of labels for each text."
    )
    use_activation: StrictBool | None = Field(None, description="false gives raw logits.")


_REFUSAL = {"error": {"message": "input[0] has 3 texts; a pair has two"}}
_SCHEMA = ClassifyRequest.model_json_schema()


@router.post(
    "/v1/classifier",
    summary="Logits of texts or pairs, RTP-LLM's shape",
    openapi_extra=describe(
        _SCHEMA, {"input": [["what is panda?", "hi"]]}, {"object": "list", "score": [[-5.6]]}, _REFUSAL
    ),
)
@speaking(error_bodies.RTP_LLM)
async def classify_rtp_llm(request: Request) -> Response:
    """Raw logits of every text or pair."""
    own = services(request)
    body = await read(request, ClassifyRequest, own.settings.max_body_bytes)
    # As there, where texts are always cut.
    pipeline, made = await _classify(own, body, default_truncation="right")
    answer: dict[str, Any] = {
        "object": "list",
        "score": await matrix(made.logits),
        "model": body.model or pipeline.served_model_name,
        "labels": pipeline.labels,
        "usage": usage(made),
    }
    places = made.is_truncated.nonzero()[0].tolist()
    return respond(
        {**answer, "truncated": places} if places else answer,
        headers=usage_header(usage(made)),
    )


@router.post(
    "/v1/classify",
    summary="Classify texts or pairs",
    openapi_extra=describe(
        _SCHEMA,
        {"input": ["I love this"]},
        {
            "id": "classify-5f1c",
            "object": "list",
            "created": 1764000000,
            "model": "sentiment",
            "data": [{"index": 0, "label": "positive", "probs": [0.02, 0.98], "num_classes": 2}],
            "usage": {"prompt_tokens": 5, "total_tokens": 5},
        },
        _REFUSAL,
    ),
)
@router.post("/classify", include_in_schema=False)
async def classify_texts(request: Request) -> Response:
    """vLLM's and SGLang's answer; with `raw_scores`, infinity's."""
    own = services(request)
    body = await read(request, ClassifyRequest, own.settings.max_body_bytes)
    pipeline, made = await _classify(own, body)
    is_raw = bool(body.raw_scores) or body.use_activation is False
    activation = "identity" if is_raw else pipeline.label_activation
    loop = asyncio.get_running_loop()
    scores = await loop.run_in_executor(own.calculator, activate, made.logits, activation)
    is_infinity = body.raw_scores is not None
    data: list[Any]
    if is_infinity:
        data = await in_turns(scores, lambda row: classes.labelled(pipeline, row))
    else:
        data = await in_turns(range(len(scores)), lambda i: _class(pipeline, scores[i], i, made))
    return respond(
        {
            "id": f"classify-{uuid.uuid4().hex}",
            "object": "classify" if is_infinity else "list",
            "created": int(time.time()),
            "model": body.model or pipeline.served_model_name,
            "data": data,
            "usage": usage(made),
        },
        # infinity's rows are lists, which cannot say it.
        headers=truncated_header(made.is_truncated.nonzero()[0].tolist()) if is_infinity else {},
    )


@router.post(
    "/predict",
    summary="Classify, text-embeddings-inference's shape",
    openapi_extra=describe(
        PredictRequest.model_json_schema(),
        {"inputs": "I love this"},
        [{"score": 0.98, "label": "positive"}, {"score": 0.02, "label": "negative"}],
        {"error": "inputs is an empty list", "error_type": "Empty"},
    ),
)
@speaking(error_bodies.TEI)
async def predict(request: Request) -> Response:
    """Labels by their score; a flat list of two strings is one pair, not two texts."""
    own = services(request)
    body = check(PredictRequest, parse(await read_bytes(request, own.settings.max_body_bytes)))
    rows, headers = await classes.predict(
        own.inference, own.catalog, own.calculator, body, own.settings.max_documents
    )
    return respond(rows, headers=headers)


async def _classify(
    own: Services, body: ClassifyRequest, default_truncation: str | None = None
) -> tuple[Pipeline, Classified]:
    value = [body.input] if isinstance(body.input, (str, dict)) else body.input
    if not isinstance(value, list):
        raise BadRequest("input takes a text, or a list of texts or of pairs of texts", param="input")
    if not value:
        raise EmptyInput("input is an empty list; send at least one text", param="input")
    if len(value) > own.settings.max_documents:
        raise BadRequest(
            f"input has {len(value)} items; at most {own.settings.max_documents} can be sent in one request",
            param="input",
        )
    texts = [classes.text_or_pair(item, f"input[{i}]") for i, item in enumerate(value)]
    pipeline = await own.catalog.find(body.model, Task.CLASSIFY)
    asked = body.truncate if body.truncate is not None else body.truncation
    if asked is None and body.truncate_prompt_tokens is not None:
        asked = True
    truncation = default_truncation if asked is None else "right" if asked else "error"
    options = TextOptions(
        instruction=read_instruction(body.instruction, body.instruct, pipeline),
        truncation=truncation,
        max_tokens=read_limit(body.truncate_prompt_tokens),
    )
    return pipeline, await classes.logits(own.inference, pipeline, texts, options, "input")


def _class(pipeline: Pipeline, row: Array, index: int, made: Classified) -> dict[str, Any]:
    """vLLM's row of one text."""
    return {
        "index": index,
        "label": pipeline.labels[int(row.argmax())],
        "probs": row.tolist(),
        "num_classes": len(row),
        **({"truncated": True} if made.is_truncated[index] else {}),
    }


DIALECT = Dialect(router, error_bodies.OPENAI)
