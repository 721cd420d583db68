"""What a dialect declares, and what the application gives its endpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request

from gateway.catalog import Catalog
from gateway.errors import GatewayError
from gateway.inference import Inference
from gateway.readiness import Readiness
from gateway.settings import Settings


@dataclass(frozen=True)
class Services:
    """What every endpoint may use; one for each application."""

    settings: Settings
    inference: Inference
    catalog: Catalog
    readiness: Readiness


@dataclass(frozen=True)
class Dialect:
    """Somebody's HTTP API: its routes and the body of its errors."""

    router: APIRouter
    render_error: Callable[[GatewayError], Any]
    """An error -> the JSON content of its response."""


def services(request: Request) -> Services:
    """The application's services."""
    found: Services = request.app.state.services
    return found


def describe_body(schema: dict[str, Any]) -> dict[str, Any]:
    """Shows a body in /docs that an endpoint reads itself, past FastAPI's own parser."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
