"""What a dialect declares, and what the application gives its endpoints."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter, Request

from gateway.catalog import Catalog
from gateway.error_bodies import ErrorStyle
from gateway.images import ImageLoader
from gateway.inference import Inference
from gateway.readiness import Readiness
from gateway.scoring import Scorer
from gateway.settings import Settings
from gateway.vocabulary import Vocabulary

# What gateway/urgency.py reads of every body.
_URGENCY = {
    "timeout": {
        "type": "number",
        "exclusiveMinimum": 0,
        "description": "Seconds that an answer may take. Without one in time there is 504, and what has not "
        "begun by then is not computed. Also the header x-request-timeout.",
    },
    "priority": {
        "enum": ["interactive", "bulk"],
        "description": "The lane in which a request waits when there is more to do than can be done. Without "
        "it a request of more than one token budget is bulk. Also the header x-priority.",
    },
}


@dataclass(frozen=True)
class Services:
    """What every endpoint may use; one for each application."""

    settings: Settings
    inference: Inference
    catalog: Catalog
    readiness: Readiness
    vocabulary: Vocabulary
    scorer: Scorer
    calculator: Executor
    """Runs what would hold up the event loop."""
    images: ImageLoader


@dataclass(frozen=True)
class Dialect:
    """Somebody's HTTP API: its routes, and how it tells of errors."""

    router: APIRouter
    errors: ErrorStyle


def speak(request: Request, style: ErrorStyle) -> None:
    """Chooses how errors of this request are told, where its body says which dialect it speaks."""
    request.state.error_style = style


Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


def speaking(style: ErrorStyle) -> Callable[[Endpoint], Endpoint]:
    """Marks an endpoint that tells of errors in another style than its file's dialect, those too that are
    found before it runs.
    """

    def mark(endpoint: Endpoint) -> Endpoint:
        endpoint.error_style = style  # type: ignore[attr-defined]
        return endpoint

    return mark


def style_of(endpoint: object) -> ErrorStyle | None:
    """The mark of an endpoint, if it has one."""
    style: ErrorStyle | None = getattr(endpoint, "error_style", None)
    return style


def services(request: Request) -> Services:
    """The application's services."""
    found: Services = request.app.state.services
    return found


def describe(schema: dict[str, Any], example: Any, answer: Any, refusal: Any) -> dict[str, Any]:
    """Shows in /docs what an endpoint reads and writes itself, past FastAPI's own parser.

    The example must be a request that every server can answer: the page offers to send it.
    """

    def content(**what: Any) -> dict[str, Any]:
        return {"content": {"application/json": what}}

    kind = "array" if isinstance(answer, list) else "object"
    schema = {**schema, "properties": {**schema["properties"], **_URGENCY}}
    return {
        "requestBody": {"required": True, **content(schema=_inlined(schema), example=example)},
        "responses": {
            "200": {"description": "The answer", **content(schema={"type": kind}, example=answer)},
            "default": {"description": "What is wrong with the request, or here", **content(example=refusal)},
        },
    }


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without references: a reference points into the document, where a part of it has no place."""
    definitions = schema.get("$defs", {})

    def inline(part: Any) -> Any:
        if isinstance(part, list):
            return [inline(one) for one in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            name = part["$ref"].rsplit("/", 1)[-1]
            return inline(
                {**definitions[name], **{key: value for key, value in part.items() if key != "$ref"}}
            )
        return {key: inline(value) for key, value in part.items() if key != "$defs"}

    result: dict[str, Any] = inline(schema)
    return result
