"""OpenAI's embeddings and models endpoints.

*Source:* OpenAI's API reference for /v1/embeddings and /v1/models, and what openai-python 3.54 sends and
reads.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, WithJsonSchema

from backends.contract import ErrorCode, Task
from gateway.endpoints.dialect import Dialect, describe, services
from gateway.errors import BadRequest, BodyTooLarge, GatewayError, RefusedItem, ServerFault, UnknownModel
from gateway.inference import Pipeline
from gateway.settings import Settings
from gateway.tasks import Embeddings, Items, TextOptions, embed
from gateway.wire import read, respond, to_base64

router = APIRouter()

# What a client of this dialect can do about a refused item, where the stage's own words cannot know it.
_ADVICE = {
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: 'Send "truncate": true to have it cut.',
    ErrorCode.INVALID_TOKEN_ID: (
        "LangChain's OpenAIEmbeddings sends ids of OpenAI's own tokenizer unless it is made with "
        "check_embedding_ctx_length=False."
    ),
}


_KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number that is not whole, or is huge",
    str: "a string",
    list: "a list",
}


# Checked by _items: a validator that tries four kinds of list in turn takes seconds for a large one.
_INPUT_SCHEMA = {
    "description": "A text, a list of texts, a list of token ids, or a list of such lists.",
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ],
}


class EmbeddingRequest(BaseModel):
    """The body of POST /v1/embeddings. Fields that are not named here are ignored, null means absent."""

    model_config = ConfigDict(extra="ignore")

    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)]
    model: str | None = Field(None, description="May be left out: the first embedding model answers then.")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: StrictInt | None = Field(
        None, ge=1, description="Keep this many components, and unit length."
    )
    user: Any = None
    prompt_name: str | None = Field(None, description="One of the model's own prompts, such as query.")
    prompt: str | None = Field(None, description="A text that is put before every input.")
    truncate: StrictBool | None = Field(
        None, description="Cut an input that is over the limit, or refuse it."
    )
    truncation_side: Literal["left", "right"] | None = Field(None, description="Which side is cut off.")
    normalize: StrictBool | None = Field(None, description="Unit length or not, whatever the model says.")


_EXAMPLES = (
    {"input": ["Hello, world", "Good morning"], "dimensions": 4},
    {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": [0.5, -0.5, 0.5, 0.5]} for i in range(2)],
        "model": "all-MiniLM-L6-v2",
        "usage": {"prompt_tokens": 9, "total_tokens": 9},
    },
    {
        "error": {
            "message": "input[1] is an empty string; leave it out, or send some text",
            "type": "invalid_request_error",
            "param": "input",
            "code": None,
        }
    },
)


@router.post(
    "/v1/embeddings",
    summary="Embed texts",
    openapi_extra=describe(EmbeddingRequest.model_json_schema(), *_EXAMPLES),
)
@router.post("/embeddings", include_in_schema=False)
async def create_embeddings(request: Request) -> Response:
    """Dense embeddings of texts or of token ids, in OpenAI's format."""
    own = services(request)
    body = await read(request, EmbeddingRequest, own.settings.max_body_bytes)
    items = _items(body.input, own.settings)
    pipeline = await own.catalog.find(body.model, Task.EMBED)
    embeddings = await embed(own.inference, pipeline, items, _options(body, pipeline))
    return respond(
        _answer(embeddings, body.model or pipeline.served_model_name, body.encoding_format == "base64")
    )


@router.get("/v1/models", summary="List the models")
async def list_models(request: Request) -> Response:
    """The models that are loaded, with what each serves."""
    own = services(request)
    models = [_describe(pipeline, own.readiness.started_at) for pipeline in await own.catalog.refresh()]
    return respond({"object": "list", "data": models})


@router.get("/v1/models/{model:path}", summary="Describe one model")
async def retrieve_model(request: Request, model: str) -> Response:
    """One model by its id, which may hold slashes."""
    if not model:
        return await list_models(request)
    own = services(request)
    return respond(_describe(await own.catalog.find(model), own.readiness.started_at))


def _items(value: Any, settings: Settings) -> Items:
    """The four forms of `input`. Raises BadRequest, which names the item at fault."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise _bad_input(
            f"input is {_kind(value)}; it takes a string, a list of strings, or lists of token ids"
        )
    if not value:
        raise _bad_input("input is an empty list; send at least one text")
    if _is_id(value[0]):
        value = [value]
    if len(value) > settings.max_items:
        raise _bad_input(
            f"input has {len(value)} items; at most {settings.max_items} can be sent in one request"
        )
    return _texts(value) if isinstance(value[0], str) else _id_rows(value, settings.max_token_ids)


def _texts(value: list[Any]) -> Items:
    for i, text in enumerate(value):
        if not isinstance(text, str):
            raise _bad_input(f"input[{i}] is {_kind(text)}; after a string, every item must be a string")
        if not text:
            raise _bad_input(f"input[{i}] is an empty string; leave it out, or send some text")
    return Items.of_texts(value)


def _id_rows(value: list[Any], max_token_ids: int) -> Items:
    for i, row in enumerate(value):
        if not isinstance(row, list):
            raise _bad_input(f"input[{i}] is {_kind(row)}; items are strings, or lists of token ids")
        if not row:
            raise _bad_input(f"input[{i}] is an empty list; leave it out, or send some token ids")
    count = sum(map(len, value))
    if count > max_token_ids:
        raise _bad_input(f"input has {count} token ids; at most {max_token_ids} can be sent in one request")
    for i, row in enumerate(value):
        for token in row:
            if not _is_id(token):
                raise _bad_input(
                    f"input[{i}] holds {_kind(token)}; a list of token ids holds whole numbers only"
                )
            if not 0 <= token < 2**31:
                raise _bad_input(
                    f"input[{i}]: {token} is no token id of any model; {_ADVICE[ErrorCode.INVALID_TOKEN_ID]}",
                    code=ErrorCode.INVALID_TOKEN_ID,
                )
    return Items.of_ids(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "an object")


def _bad_input(message: str, code: str | None = None) -> BadRequest:
    return BadRequest(message, param="input", code=code)


def _options(body: EmbeddingRequest, pipeline: Pipeline) -> TextOptions:
    if (
        body.dimensions is not None
        and pipeline.dimensions is not None
        and body.dimensions > pipeline.dimensions
    ):
        raise BadRequest(
            f"dimensions is {body.dimensions}; {pipeline.served_model_name} takes 1 to {pipeline.dimensions}",
            param="dimensions",
            code=ErrorCode.INVALID_DIMENSIONS,
        )
    truncation = None
    if body.truncate is False:
        truncation = "error"
    elif body.truncate or body.truncation_side:
        truncation = body.truncation_side or "right"
    return TextOptions(body.prompt_name, body.prompt, truncation, body.dimensions, body.normalize)


def _answer(embeddings: Embeddings, model: str, is_base64: bool) -> dict[str, Any]:
    vectors = np.ascontiguousarray(embeddings.vectors)
    data: list[dict[str, Any]] = [
        {"object": "embedding", "index": i, "embedding": to_base64(row) if is_base64 else row}
        for i, row in enumerate(vectors)
    ]
    for i in np.flatnonzero(embeddings.is_truncated).tolist():
        data[i]["truncated"] = True
    n_tokens = int(embeddings.n_tokens.sum())
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _describe(pipeline: Pipeline, created: int) -> dict[str, Any]:
    return {
        "id": pipeline.served_model_name,
        "object": "model",
        "created": created,
        "owned_by": "triton-embeddings",
        "tasks": sorted(pipeline.tasks),
        "family": pipeline.family,
        "dimensions": pipeline.dimensions,
        "max_length": pipeline.max_length,
    }


def render_error(error: GatewayError) -> dict[str, Any]:
    """{"error": {"message", "type", "param", "code"}}."""
    message, param = error.message, error.param
    if isinstance(error, RefusedItem):
        param = _PARAMS.get(error.reason, "input")
        advice = _ADVICE.get(error.reason)
        where = f"input[{error.item}]: " if error.item is not None else ""
        message = f"{where}{message}" + (f". {advice}" if advice else "")
    kind = "server_error" if isinstance(error, ServerFault) else "invalid_request_error"
    return {
        "error": {
            "message": message,
            "type": kind,
            "param": param,
            "code": error.code or _CODES.get(type(error)),
        }
    }


_PARAMS = {
    ErrorCode.UNKNOWN_PROMPT: "prompt_name",
    ErrorCode.INVALID_PROMPT: "prompt",
    ErrorCode.INVALID_DIMENSIONS: "dimensions",
}
_CODES: dict[type[GatewayError], str] = {BodyTooLarge: "body_too_large", UnknownModel: "model_not_found"}

DIALECT = Dialect(router, render_error)
