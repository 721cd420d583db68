"""Classification in the shapes of RTP-LLM, vLLM and SGLang, infinity, and text-embeddings-inference.

*Source:* RTP-LLM 4b8d39cd5 downstream_modules/classifier; vLLM 0.13 entrypoints/pooling/classify; infinity
0.0.78 fastapi_schemas; text-embeddings-inference 1.9 router/src/http/types.rs.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool

from backends.contract import Task
from gateway import error_bodies
from gateway.endpoints.dialect import Dialect, Services, describe, services, speak
from gateway.errors import BadRequest, EmptyInput
from gateway.inference import Array, Pipeline
from gateway.inputs import SIDES, read_text
from gateway.scoring import activate
from gateway.tasks import Classified, Items, TextOptions, classify
from gateway.wire import check, in_turns, parse, read, read_bytes, respond

router = APIRouter()

Text = str | tuple[str, str]


class ClassifyRequest(BaseModel):
    """The body of all routes but /predict."""

    model_config = ConfigDict(extra="ignore")

    input: Any = Field(description="A text, or a list of texts or of pairs of texts.")
    model: str | None = None
    truncate: StrictBool | None = None
    truncation: StrictBool | None = None
    raw_scores: StrictBool | None = Field(
        None, description="infinity's answer: a list of labels for each text."
    )
    use_activation: StrictBool | None = Field(None, description="false gives raw logits.")


class PredictRequest(BaseModel):
    """The body of /predict."""

    model_config = ConfigDict(extra="ignore")

    inputs: Any = Field(
        description="A text; a pair, as a flat list of two strings; a batch, as lists of one or two."
    )
    model: str | None = None
    truncate: StrictBool | None = None
    truncation_direction: str | None = None
    raw_scores: StrictBool | None = None


_REFUSAL = {"error": {"message": "input[0] has 3 texts; a pair has two"}}
_SCHEMA = ClassifyRequest.model_json_schema()


@router.post(
    "/v1/classifier",
    summary="Logits of texts or pairs, RTP-LLM's shape",
    openapi_extra=describe(
        _SCHEMA, {"input": [["what is panda?", "hi"]]}, {"object": "list", "score": [[-5.6]]}, _REFUSAL
    ),
)
async def classify_rtp_llm(request: Request) -> Response:
    """Raw logits of every text or pair."""
    speak(request, error_bodies.RTP_LLM)
    own = services(request)
    body = await read(request, ClassifyRequest, own.settings.max_body_bytes)
    pipeline, made = await _classify(own, body)
    answer: dict[str, Any] = {
        "object": "list",
        "score": np.ascontiguousarray(made.logits),
        "model": body.model or pipeline.served_model_name,
        "labels": pipeline.labels,
        "usage": _usage(made),
    }
    places = made.is_truncated.nonzero()[0].tolist()
    return respond({**answer, "truncated": places} if places else answer)


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
    scores = activate(made.logits, "identity" if is_raw else pipeline.label_activation)
    is_infinity = body.raw_scores is not None
    data: list[Any]
    if is_infinity:
        data = await in_turns(scores, lambda row: _labelled(pipeline, row))
    else:
        data = [
            {
                "index": i,
                "label": pipeline.labels[int(row.argmax())],
                "probs": row,
                "num_classes": len(row),
                **({"truncated": True} if made.is_truncated[i] else {}),
            }
            for i, row in enumerate(np.ascontiguousarray(scores))
        ]
    return respond(
        {
            "id": f"classify-{uuid.uuid4().hex}",
            "object": "classify" if is_infinity else "list",
            "created": int(time.time()),
            "model": body.model or pipeline.served_model_name,
            "data": data,
            "usage": _usage(made),
        }
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
async def predict(request: Request) -> Response:
    """Labels by their score; a flat list of two strings is one pair, not two texts."""
    speak(request, error_bodies.TEI)
    own = services(request)
    body = check(PredictRequest, parse(await read_bytes(request, own.settings.max_body_bytes)))
    texts, is_batch = _predict_inputs(body.inputs)
    pipeline = await own.catalog.find(body.model, Task.CLASSIFY)
    truncation = None
    if body.truncate is not None:
        side = SIDES.get(body.truncation_direction or "right")
        if side is None:
            raise BadRequest(
                f"truncation_direction is {body.truncation_direction!r}; it takes left or right",
                param="truncation_direction",
            )
        truncation = side if body.truncate else "error"
    made = await _logits(own, pipeline, texts, TextOptions(truncation=truncation), "inputs")
    scores = activate(made.logits, "identity" if body.raw_scores else pipeline.label_activation)
    rows = await in_turns(scores, lambda row: _labelled(pipeline, row))
    places = made.is_truncated.nonzero()[0].tolist()
    headers = {"x-truncated-inputs": ",".join(map(str, places))} if places else {}
    return respond(rows if is_batch else rows[0], headers=headers)


async def _classify(own: Services, body: ClassifyRequest) -> tuple[Pipeline, Classified]:
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
    texts = [_text_or_pair(item, f"input[{i}]") for i, item in enumerate(value)]
    pipeline = await own.catalog.find(body.model, Task.CLASSIFY)
    asked = body.truncate if body.truncate is not None else body.truncation
    truncation = None if asked is None else "right" if asked else "error"
    return pipeline, await _logits(own, pipeline, texts, TextOptions(truncation=truncation), "input")


def _predict_inputs(value: Any) -> tuple[list[Text], bool]:
    """The texts, and whether the client sent a batch."""
    if isinstance(value, (str, dict)):
        return [read_text(value, "inputs")], False
    if not isinstance(value, list):
        raise BadRequest(
            "inputs takes a text, a pair, or a list of lists of one or two texts", param="inputs"
        )
    if not value:
        raise EmptyInput("inputs is an empty list; send at least one text", param="inputs")
    if all(isinstance(item, str) for item in value):
        if len(value) > 2:
            raise BadRequest(
                f"inputs is a flat list of {len(value)} strings; one or two are one text or one "
                "pair, and a batch is a "
                "list of lists",
                param="inputs",
            )
        return [_text_or_pair(value, "inputs")], False
    return [_text_or_pair(item, f"inputs[{i}]") for i, item in enumerate(value)], True


def _text_or_pair(item: Any, field: str) -> Text:
    if not isinstance(item, list):
        return read_text(item, field)
    if len(item) == 1:
        return read_text(item[0], field)
    if len(item) != 2:
        raise BadRequest(f"{field} has {len(item)} texts; a pair has two", param=field.split("[")[0])
    return read_text(item[0], f"{field}[0]"), read_text(item[1], f"{field}[1]")


async def _logits(
    own: Services, pipeline: Pipeline, texts: list[Text], options: TextOptions, field: str
) -> Classified:
    is_pair = [isinstance(text, tuple) for text in texts]
    if any(is_pair) and not all(is_pair):
        odd = is_pair.index(not is_pair[0])
        raise BadRequest(
            f"{field}[{odd}] is {'a pair' if is_pair[odd] else 'a text'}, and those before it are "
            "not; send texts and "
            "pairs in requests of their own",
            param=field,
        )
    if is_pair[0]:
        items = Items.of_pairs(text for text in texts if isinstance(text, tuple))
    else:
        items = Items.of_texts([text for text in texts if isinstance(text, str)])
    return await classify(own.inference, pipeline, items, options)


def _labelled(pipeline: Pipeline, row: Array) -> list[dict[str, Any]]:
    """Labels and their scores, best first."""
    order = np.argsort(-row, kind="stable").tolist()
    return [{"score": float(row[i]), "label": pipeline.labels[i]} for i in order]


def _usage(made: Classified) -> dict[str, int]:
    count = int(made.n_tokens.sum())
    return {"prompt_tokens": count, "total_tokens": count}


DIALECT = Dialect(router, error_bodies.OPENAI)
