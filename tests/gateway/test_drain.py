"""The end of a gateway's process without a server; tests/server/test_drain.py has the whole."""

import asyncio

import pytest

from gateway.app import create_app
from gateway.drain import Drain, Draining
from gateway.settings import Settings
from tests.gateway.conftest import running
from tests.support.fake_inference import FakeInference

BODY = {"input": "a"}


async def test_answers_close_their_connections_and_ready_says_why(monkeypatch):
    drain = Drain()
    monkeypatch.setattr("gateway.app.Drain", lambda: drain)
    inference = FakeInference()
    async with running(inference) as client:
        assert "connection" not in (await client.post("/v1/embeddings", json=BODY)).headers
        drain.begin()
        answer = await client.post("/v1/embeddings", json=BODY)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        ready = await client.get("/ready")
        assert (ready.status_code, ready.json()["reason"]) == (503, "this gateway is stopping")
        assert (await client.get("/health")).status_code == 200


async def test_what_is_not_answered_in_time_is_refused_in_its_own_dialect(monkeypatch):
    drain = Drain()
    monkeypatch.setattr("gateway.app.Drain", lambda: drain)
    inference = FakeInference()
    page = "https://app.example.com"
    async with running(inference, canary_interval_s=3600, cors_origins=page) as client:
        client.headers["origin"] = page
        await client.post("/v1/embeddings", json=BODY)
        inference.release.clear()
        late = [
            asyncio.create_task(client.post(path, json=body))
            for path, body in (("/v1/embeddings", BODY), ("/v2/embed", COHERE), ("/embed", {"inputs": "a"}))
        ]
        asked = len(inference.calls) + 3
        while len(inference.calls) < asked:
            assert not any(one.done() for one in late), [one.result().text for one in late if one.done()]
            await asyncio.sleep(0.001)
        drain.begin()
        drain.end()
        answers = [await one for one in late]
        inference.release.set()
    assert [answer.status_code for answer in answers] == [503] * 3
    assert {answer.headers["retry-after"] for answer in answers} == {"1"}
    assert {answer.headers["connection"] for answer in answers} == {"close"}
    assert all("x-request-id" in answer.headers for answer in answers)
    assert {answer.headers["access-control-allow-origin"] for answer in answers} == {page}, (
        "a page can read it"
    )
    texts = [answer.json() for answer in answers]
    assert "the gateway is stopping" in texts[0]["error"]["message"]
    assert "the gateway is stopping" in texts[1]["message"]
    assert "the gateway is stopping" in texts[2]["error"]


async def test_who_stops_the_process_in_the_same_moment_is_obeyed():
    drain = Drain()

    async def app(scope, receive, send):
        await asyncio.Event().wait()

    async def answer(request, error):
        raise AssertionError("the task was to end")

    task = asyncio.create_task(Draining(app, drain, answer)({"type": "http"}, None, None))
    await asyncio.sleep(0)
    drain.end()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


COHERE = {"model": "org/tiny", "texts": ["a"], "input_type": "search_query", "embedding_types": ["float"]}


async def test_the_server_finds_the_drain_in_the_lifespan_s_state():
    app = create_app(Settings(), FakeInference())
    async with app.router.lifespan_context(app) as state:
        assert isinstance(state["drain"], Drain)
