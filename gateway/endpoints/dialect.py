"""What a dialect declares, and what the application gives its endpoints."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request

from gateway.catalog import Catalog
from gateway.error_bodies import ErrorStyle
from gateway.inference import Inference
from gateway.readiness import Readiness
from gateway.scoring import Scorer
from gateway.settings import Settings
from gateway.vocabulary import Vocabulary


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


@dataclass(frozen=True)
class Dialect:
    """Somebody's HTTP API: its routes, and how it tells of errors."""

    router: APIRouter
    errors: ErrorStyle


def speak(request: Request, style: ErrorStyle) -> None:
    """Chooses how errors of this request are told, on a route that several dialects share."""
    request.state.error_style = style


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

    return {
        "requestBody": {"required": True, **content(schema=schema, example=example)},
        "responses": {
            "200": {"description": "The answer", **content(schema={"type": "object"}, example=answer)},
            "400": {"description": "What is wrong with the request", **content(example=refusal)},
        },
    }
