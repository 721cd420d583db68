"""The whole HTTP surface over a stand-in for the inference server."""

import contextlib

import httpx
import pytest

from gateway.app import create_app
from gateway.settings import Settings
from tests.support.fake_inference import KINDS, ROLES, FakeInference


@contextlib.asynccontextmanager
async def running(inference, **settings):
    """A client of an application that has started, and stops afterwards."""
    app = create_app(Settings(**settings), inference)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            yield client


@pytest.fixture
async def inference():
    return FakeInference()


@pytest.fixture
async def client(inference):
    async with running(
        inference, max_body_bytes=100_000, max_items=10, max_token_ids=30, canary_interval_s=0.2
    ) as made:
        yield made


@pytest.fixture
async def kinds():
    """A client of a gateway whose first model has every head, and whose second is a late interaction
    model.
    """
    async with running(FakeInference([KINDS, ROLES]), max_items=10) as made:
        yield made
