"""Cohere's embeddings: of texts, of images, or of both in one, as floats or in fewer bytes.

*Source:* Cohere's API reference for v1 and v2 embed, and what cohere-python 7.3 sends and reads.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from backends.contract import Task
from gateway.drafts import Drafts, load_items
from gateway.endpoints.dialect import Dialect, describe, services
from gateway.error_bodies import COHERE
from gateway.errors import BadRequest
from gateway.inputs import MAX_INT, ROLES, Strings, TextFields, kind_of, text_options
from gateway.items import read_drafts
from gateway.pipeline import Pipeline
from gateway.quantization import QUANTIZATIONS
from gateway.settings import Settings
from gateway.tasks import Representations, TextOptions, represent
from gateway.wire import matrix, read, respond, to_base64

router = APIRouter()

# Cohere cuts unless it is told not to. The booleans are those of the other dialects.
_TRUNCATIONS = {
    None: "right",
    "END": "right",
    "START": "left",
    "NONE": "error",
    True: "right",
    False: "error",
}
_KIND = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]


class EmbedRequest(BaseModel):
    """The body of both routes; fields that are not named are ignored, null means absent."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = Field(
        None, description="May be left out: the first model that serves what is asked for answers then."
    )
    input_type: Literal["search_document", "search_query", "classification", "clustering", "image"] | None = (
        Field(None, description="Tells queries and documents apart, for models that treat them differently.")
    )
    texts: Strings | None = Field(None, description="One of texts, images and inputs.")
    images: Strings | None = Field(None, description="Data URLs, base64, or where the server allows it URLs.")
    inputs: list[Any] | None = Field(None, description='Items of several parts: {"content": [...]}.')
    max_tokens: StrictInt | None = Field(None, ge=1, le=MAX_INT)
    output_dimension: StrictInt | None = Field(None, ge=1, le=MAX_INT)
    embedding_types: Annotated[list[_KIND], Field(fail_fast=True)] | None = Field(None, min_length=1)
    truncate: Literal["NONE", "START", "END"] | StrictBool | None = Field(
        None, description="Which end of a text over the limit is cut off, or none; END without it."
    )
    prompt_name: str | None = None
    prompt: str | None = None
    instruction: str | None = None
    normalize: StrictBool | None = None


_SCHEMA = EmbedRequest.model_json_schema()
_QUESTION = {"texts": ["Hello, world"], "input_type": "search_document"}
_META = {"billed_units": {"input_tokens": 5}}
_REFUSAL = {"message": "texts[0] is an empty string; leave it out, or send some text"}


def _example(version: str, kind: str, embeddings: Any) -> dict[str, Any]:
    return {
        "id": "embed-5f1c",
        "response_type": kind,
        "embeddings": embeddings,
        "texts": ["Hello, world"],
        "meta": {"api_version": {"version": version}, **_META},
    }


@router.post(
    "/v2/embed",
    summary="Embed, Cohere's second shape",
    openapi_extra=describe(
        _SCHEMA, _QUESTION, _example("2", "embeddings_by_type", {"float": [[0.5, -0.5, 0.5, 0.5]]}), _REFUSAL
    ),
)
async def embed(request: Request) -> Response:
    """Embeddings of every type that is asked for; floats without `embedding_types`."""
    return await _embed(request, "2")


@router.post(
    "/v1/embed",
    summary="Embed, Cohere's first shape",
    openapi_extra=describe(
        _SCHEMA, _QUESTION, _example("1", "embeddings_floats", [[0.5, -0.5, 0.5, 0.5]]), _REFUSAL
    ),
)
async def embed_first(request: Request) -> Response:
    """The same, but without `embedding_types` a bare list of floats."""
    return await _embed(request, "1")


async def _embed(request: Request, version: str) -> Response:
    own = services(request)
    body = await read(request, EmbedRequest, own.settings.max_body_bytes)
    drafts = _read_drafts(body, own.settings)
    pipeline = await own.catalog.find(body.model, Task.EMBED, needs=drafts.needs)
    options = _options(body, pipeline)
    (items,) = await load_items(own.images, own.catalog, pipeline, drafts)
    made = await represent(own.inference, pipeline, items, [Task.EMBED], options, drafts.field)
    is_bare = version == "1" and body.embedding_types is None
    vectors = {kind: await _vectors(made, kind) for kind in body.embedding_types or ["float"]}
    return respond(
        {
            "id": f"embed-{uuid.uuid4().hex}",
            "response_type": "embeddings_floats" if is_bare else "embeddings_by_type",
            "embeddings": vectors["float"] if is_bare else vectors,
            "texts": body.texts or [],
            "meta": _meta(version, drafts, made),
        }
    )


def _read_drafts(body: EmbedRequest, settings: Settings) -> Drafts:
    given = {name: getattr(body, name) for name in ("texts", "images", "inputs")}
    there = [name for name, value in given.items() if value is not None]
    if len(there) != 1:
        held = " and ".join(there) or "none of them"
        raise BadRequest(f"a request has one of texts, images and inputs; this one has {held}")
    (field,) = there
    for i, item in enumerate(body.inputs or ()):
        if not isinstance(item, dict):
            raise BadRequest(
                f'inputs[{i}] is {kind_of(item)}; it takes {{"content": [parts]}}', param="inputs"
            )
    return read_drafts(given[field], settings, field, strings_are_images=field == "images")


def _options(body: EmbedRequest, pipeline: Pipeline) -> TextOptions:
    fields = TextFields.model_validate(
        {
            "input_type": body.input_type if body.input_type in ROLES else None,
            "prompt_name": body.prompt_name,
            "prompt": body.prompt,
            "instruction": body.instruction,
            "normalize": body.normalize,
            "dimensions": body.output_dimension,
        }
    )
    options = text_options(fields, pipeline, [Task.EMBED], "output_dimension")
    return replace(options, truncation=_TRUNCATIONS[body.truncate], max_tokens=body.max_tokens)


async def _vectors(made: Representations, kind: str) -> Any:
    """Embeddings of one type, as JSON will have them."""
    assert made.dense is not None
    if kind == "base64":
        return [to_base64(row) for row in made.dense]
    return await matrix(made.dense if kind == "float" else QUANTIZATIONS[kind](made.dense))


def _meta(version: str, drafts: Drafts, made: Representations) -> dict[str, Any]:
    billed = {"input_tokens": int(made.n_tokens.sum())}
    if drafts.has_images:
        billed["images"] = sum(len(draft.images) for draft in drafts.with_images.values())
    meta: dict[str, Any] = {"api_version": {"version": version}, "billed_units": billed}
    cut = np.flatnonzero(made.is_truncated).tolist()
    if cut:
        meta["warnings"] = [f"{drafts.field}[{i}] was cut to {made.n_tokens[i]} tokens" for i in cut]
    return meta


DIALECT = Dialect(router, COHERE)
