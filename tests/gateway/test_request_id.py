"""Every answer names its request."""

import httpx
import pytest

from gateway.app import create_app
from gateway.settings import Settings


@pytest.mark.parametrize("given", ["abc-1", "a" * 128])
async def test_the_clients_own_id_comes_back(client, given):
    answer = await client.get("/health", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "a b", "a" * 129])
async def test_without_a_usable_one_it_gets_another(client, given):
    headers = {} if given is None else {"x-request-id": given}
    ids = [(await client.get("/nothing", headers=headers)).headers["x-request-id"] for _ in range(2)]
    assert len({*ids, given}) == 3


async def test_an_unexpected_error_names_its_request_too(inference, monkeypatch):
    app = create_app(Settings(), inference)
    async with app.router.lifespan_context(app):
        monkeypatch.setattr(app.state.services.catalog, "find", None)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            answer = await client.post("/v1/embeddings", json={"input": "a"}, headers={"x-request-id": "me"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "me"
