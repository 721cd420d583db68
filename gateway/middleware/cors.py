"""Lets web pages of other origins call the gateway."""

from __future__ import annotations

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

# What a page's script may read of an answer besides its body.
_EXPOSED = (
    "retry-after",
    "retry-after-ms",
    "server-timing",
    "usage",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-tokens",
    "x-request-id",
    "x-should-retry",
    "x-truncated-inputs",
)


def cors(app: ASGIApp, origins: str) -> CORSMiddleware:
    """Starlette's own, for origins with commas between them, or *.

    No cookies go along: a page that has a key sends it in a header.
    """
    return CORSMiddleware(
        app,
        allow_origins=[origin.strip().rstrip("/") for origin in origins.split(",") if origin.strip()],
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=_EXPOSED,
    )
