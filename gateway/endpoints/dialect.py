"""What a dialect declares, and what the application gives its endpoints."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request

from gateway.catalog import Catalog
from gateway.errors import GatewayError
from gateway.inference import Inference
from gateway.readiness import Readiness
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
    calculator: Executor
    """Runs what would hold up the event loop."""


@dataclass(frozen=True)
class Dialect:
    """Somebody's HTTP API: its routes and the body of its errors."""

    router: APIRouter
    render_error: Callable[[GatewayError], Any]
    """An error -> the JSON content of its response."""
    status: Callable[[GatewayError], int] = lambda error: error.status
    """An error -> the HTTP status, where the dialect has its own."""


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
