import logging

import pytest

from gateway.logs import TextFormatter
from tests.gateway.conftest import running
from tests.support.fake_inference import KINDS, RERANKER, FakeInference

MARK = "a-secret-text"


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/embeddings", {"input": ["a", "b" * 101]}, "input[1]"),
        ("/embed", {"inputs": ["a", "ä" * 51]}, "inputs[1]"),
        ("/rerank", {"query": "a", "documents": ["b" * 101], "model": "org/m3"}, "documents[0]"),
        ("/v1/embeddings/similarity", {"left": ["a"], "right": ["b" * 101]}, "right[0]"),
    ],
)
async def test_one_text_may_have_so_many_bytes(path, body, field):
    async with running(FakeInference([KINDS, RERANKER]), max_text_bytes=100) as client:
        answer = await client.post(path, json=body)
        assert answer.status_code in (400, 422)
        assert field in answer.text
        assert "GATEWAY_MAX_TEXT_BYTES" in answer.text
        assert (await client.post("/v1/embeddings", json={"input": "b" * 100})).status_code == 200


async def test_a_prompt_may_have_so_many_bytes():
    async with running(FakeInference([KINDS]), max_prompt_bytes=100) as client:
        for prompt in ("p" * 101, "ä" * 51):
            answer = await client.post("/v1/embeddings", json={"input": "a", "prompt": prompt})
            assert answer.status_code == 400
            assert "GATEWAY_MAX_PROMPT_BYTES" in answer.json()["error"]["message"]
        answer = await client.post("/v1/embeddings", json={"input": "a", "prompt": "ä" * 50})
        assert answer.status_code == 200


@pytest.mark.parametrize("depth", [65, 1000, 10_000, 100_000])
@pytest.mark.parametrize(("before", "after"), [("[", "]"), ('{"text":', "}")])
async def test_what_is_nested_too_deep_is_told_so(client, depth, before, after):
    for path, field in (("/v1/embeddings", "input"), ("/v1/rerank", "query"), ("/embed", "inputs")):
        body = f'{{"{field}": {before * depth}1{after * depth}}}'
        if len(body) < 100_000:
            answer = await client.post(path, content=body)
            assert answer.status_code in (400, 422)
            assert "nested more than 64 deep" in answer.text


async def test_a_message_shows_only_the_beginning_of_what_was_sent(client):
    for body in (
        {"input": "a", "model": "m" * 50_000},
        {"input": {"n" * 50_000: "a"}},
        {"input": "a", "dimensions": ["x" * 50_000]},
        {"input": "a", "embedding_types": [["d"] * 10_000]},
    ):
        answer = await client.post("/v1/embeddings", json=body)
        assert answer.status_code in (400, 404)
        assert len(answer.content) < 1000


async def test_pages_of_other_origins_call_only_where_they_are_allowed(inference, client):
    asked = {"Origin": "https://app.example.com", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type"
    body = {"input": "a"}
    origin = {"Origin": "https://app.example.com"}
    refused = await client.options("/v1/embeddings", headers=asked)
    assert "access-control-allow-origin" not in refused.headers
    settings = {"cors_origins": "https://app.example.com/, http://localhost:3000", "api_key": "sk-a-good-key"}
    async with running(inference, **settings) as shared:
        allowed = await shared.options("/v1/embeddings", headers=asked)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://app.example.com"
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        # A page can read why it is refused, and its request's id.
        answer = await shared.post("/v1/embeddings", json=body, headers=origin)
        assert answer.status_code == 401
        assert answer.headers["access-control-allow-origin"] == "https://app.example.com"
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert "x-should-retry" in answer.headers["access-control-expose-headers"]
        other = await shared.post("/v1/embeddings", json=body, headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def _fail(cause):
    try:
        raise cause
    except Exception as error:
        raise KeyError(MARK) from error


@pytest.mark.parametrize("cause", [ValueError(MARK), UnicodeError(MARK), KeyError(MARK)])
def test_an_exception_is_logged_without_what_somebody_sent(cause):
    record = logging.makeLogRecord({"msg": "failed"})
    try:
        _fail(cause)
    except KeyError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    told = TextFormatter(shows_texts=False).format(record)
    assert MARK not in told
    assert f"{type(cause).__name__}: (its text" in told
    assert "test_limits.py" in told, "where it happened is there"
    record.exc_text = None
    assert MARK in TextFormatter(shows_texts=True).format(record)


def test_an_exception_of_the_program_keeps_its_text():
    record = logging.makeLogRecord({"msg": "failed"})
    try:
        None.missing  # noqa: B018
    except AttributeError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    assert "no attribute 'missing'" in TextFormatter(shows_texts=False).format(record)
