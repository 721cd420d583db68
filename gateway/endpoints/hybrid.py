"""This project's own route: dense, sparse and ColBERT representations of texts, any of them, from one
pass.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from gateway.answers import embedding_items, usage
from gateway.drafts import load_items
from gateway.endpoints.dialect import Dialect, describe, services
from gateway.error_bodies import OPENAI
from gateway.errors import WrongTask
from gateway.inputs import text_options
from gateway.items import InputFields, read_inputs
from gateway.kinds import KIND_TASKS, kinds_to_tasks
from gateway.tasks import represent
from gateway.wire import read, respond

router = APIRouter()


class HybridRequest(InputFields):
    """The body of POST /v1/embeddings/hybrid."""

    outputs: Annotated[list[Literal["dense", "sparse", "colbert"]], Field(fail_fast=True)] | None = Field(
        None, min_length=1, description="What to give for each text; without it all that the model has."
    )
    encoding_format: Literal["float", "base64"] | None = None


_EXAMPLES = (
    {"input": ["Hello, world"]},
    {
        "object": "list",
        "data": [
            {
                "object": "hybrid_embedding",
                "index": 0,
                "dense": [0.5, -0.5, 0.5, 0.5],
                "sparse": {"indices": [35378, 8999], "values": [0.21, 0.17]},
                "colbert": [[0.6, 0.8], [1.0, 0.0]],
            }
        ],
        "model": "bge-m3",
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    },
    {"error": {"message": "the model x does not serve sparse; it serves embed, tokens", "param": "model"}},
)


@router.post(
    "/v1/embeddings/hybrid",
    summary="Dense, sparse and ColBERT at once",
    openapi_extra=describe(HybridRequest.model_json_schema(), *_EXAMPLES),
)
async def create_hybrid_embeddings(request: Request) -> Response:
    """Any of the three, from one pass of the encoder; sparse as the indices and values that vector
    databases take.
    """
    own = services(request)
    body = await read(request, HybridRequest, own.settings.max_body_bytes)
    drafts, body = read_inputs(body, own.settings)
    tasks = kinds_to_tasks(body.outputs or ())
    pipeline = await own.catalog.find(body.model, *tasks, needs=drafts.needs)
    tasks = tasks or [task for task in KIND_TASKS.values() if task in pipeline.tasks]
    if not tasks:
        raise WrongTask(
            f"the model {pipeline.served_model_name} serves {', '.join(sorted(pipeline.tasks))}, and none of "
            f"{', '.join(KIND_TASKS)}",
            param="model",
            code="wrong_task",
        )
    options = text_options(body, pipeline, tasks)
    (items,) = await load_items(own.images, own.catalog, pipeline, drafts)
    made = await represent(own.inference, pipeline, items, tasks, options, drafts.field)
    is_base64 = body.encoding_format == "base64"
    return respond(
        {
            "object": "list",
            "data": await embedding_items(made, "hybrid_embedding", {}, is_base64=is_base64),
            "model": body.model or pipeline.served_model_name,
            "usage": usage(made),
        }
    )


DIALECT = Dialect(router, OPENAI)
