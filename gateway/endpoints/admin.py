"""Models that are added, replaced and removed while they serve; off unless GATEWAY_ADMIN_KEY is set."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator

from gateway.endpoints.dialect import Dialect, describe, services
from gateway.error_bodies import ErrorStyle
from gateway.live_command import LiveCommand
from gateway.wire import read, respond

router = APIRouter()
# Names that the commands could take for flags, or for paths.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_OPTION = re.compile(r"[a-z][a-z_]{0,40}")
# Whoever may add a model may not make this machine run its code, or have it look elsewhere.
_REFUSED = frozenset({"trust_remote_code", "live", "grpc_port", "model_repository", "name", "help"})

Option = bool | int | Annotated[str, Field(max_length=500)]


class AddBody(BaseModel):
    """What `triton-embeddings add` takes."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str = Field(min_length=1, max_length=4096)
    name: str | None = None
    options: dict[str, Option] = {}

    @field_validator("checkpoint")
    @classmethod
    def _check_checkpoint(cls, value: str) -> str:
        if value.startswith("-"):
            raise ValueError("it begins with '-'; give a folder's path or an id of the hub")
        return value

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str | None) -> str | None:
        if value is not None and not _NAME.fullmatch(value):
            raise ValueError("give a name of letters, digits, '.', '_' and '-'")
        return value

    @field_validator("options")
    @classmethod
    def _check_options(cls, value: dict[str, Option]) -> dict[str, Option]:
        for name in value:
            if name in _REFUSED or not _OPTION.fullmatch(name):
                raise ValueError(
                    f"{name!r} cannot be set here; it takes the options of triton-embeddings add"
                )
        return value


_EXAMPLE = {"checkpoint": "BAAI/bge-m3", "name": "bge-m3", "options": {"max_length": 512}}
_ANSWER = {
    "message": "replaced bge-m3: xlm_roberta, 1024 dimensions, 512 tokens, from hub:BAAI/bge-m3@5617a9f"
}
_REFUSAL = {"error": "bge-m3.encoder.2 cannot be loaded, so everything stays as it was: ..."}


@router.get("/admin/models", summary="The models that the server has")
async def list_models(request: Request) -> Response:
    """Name, checkpoint and the entries of the stages, of each."""
    pipelines = await services(request).catalog.refresh()
    models = [
        {
            "name": pipeline.name,
            "served_model_name": pipeline.served_model_name,
            "checkpoint": pipeline.checkpoint,
            "stages": pipeline.steps,
        }
        for pipeline in pipelines
    ]
    return respond({"models": models})


@router.post(
    "/admin/models",
    summary="Add a model, or replace the one of that name, while it serves",
    openapi_extra=describe(AddBody.model_json_schema(), _EXAMPLE, _ANSWER, _REFUSAL),
)
async def add(request: Request) -> Response:
    """The new weights serve before the old ones go; where they cannot, the old ones stay."""
    body = await read(request, AddBody, services(request).settings.max_body_bytes)
    said = await _command(request).add(body.checkpoint, body.name, body.options)
    await services(request).catalog.refresh()
    return respond({"message": said})


@router.delete("/admin/models/{name}", summary="Remove a model from the server that runs")
async def remove(request: Request, name: str) -> Response:
    """Its checkpoint stays."""
    # A name that begins with '-' would be taken for a flag, and is none.
    said = await _command(request).remove(name if _NAME.fullmatch(name) else "?")
    await services(request).catalog.refresh()
    return respond({"message": said})


def _command(request: Request) -> LiveCommand:
    state = request.app.state
    if not hasattr(state, "live_command"):
        state.live_command = LiveCommand(services(request).settings.servers)
    command: LiveCommand = state.live_command
    return command


DIALECT = Dialect(router, ErrorStyle(lambda error: {"error": error.message}))
