"""OpenAI's embeddings and models endpoints, and what vLLM, SGLang and infinity add to the first.

*Source:* OpenAI's API reference for /v1/embeddings and /v1/models, and what openai-python 3.54 sends and
reads.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from gateway.answers import embedding_items, usage
from gateway.drafts import load_items
from gateway.endpoints.dialect import Dialect, describe, services
from gateway.error_bodies import OPENAI
from gateway.inputs import text_options
from gateway.items import InputFields, read_inputs
from gateway.kinds import kinds_to_tasks
from gateway.pipeline import Pipeline
from gateway.tasks import represent
from gateway.wire import read, respond

router = APIRouter()


class EmbeddingRequest(InputFields):
    """The body of POST /v1/embeddings."""

    encoding_format: Literal["float", "base64"] | None = None
    user: Any = None
    embedding_types: Annotated[list[Literal["dense", "sparse", "colbert"]], Field(fail_fast=True)] | None = (
        Field(None, min_length=1, description="What to give for each text, from one pass; dense without it.")
    )


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
    summary="Embed texts and images",
    openapi_extra=describe(EmbeddingRequest.model_json_schema(), *_EXAMPLES),
)
@router.post("/embeddings", include_in_schema=False)
async def create_embeddings(request: Request) -> Response:
    """Embeddings of texts, images or token ids in OpenAI's format: dense, or what `embedding_types` says."""
    own = services(request)
    body = await read(request, EmbeddingRequest, own.settings.max_body_bytes)
    drafts, body = read_inputs(body, own.settings)
    tasks = kinds_to_tasks(body.embedding_types or ["dense"])
    pipeline = await own.catalog.find(body.model, *tasks, needs=drafts.needs)
    options = text_options(body, pipeline, tasks)
    (items,) = await load_items(own.images, own.catalog, pipeline, drafts)
    made = await represent(own.inference, pipeline, items, tasks, options, drafts.field)
    is_base64 = body.encoding_format == "base64"
    return respond(
        {
            "object": "list",
            "data": await embedding_items(made, "embedding", {"dense": "embedding"}, is_base64=is_base64),
            "model": body.model or pipeline.served_model_name,
            "usage": usage(made),
        }
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
        "modalities": ["text", "image"] if pipeline.takes_images else ["text"],
    }


DIALECT = Dialect(router, OPENAI)
