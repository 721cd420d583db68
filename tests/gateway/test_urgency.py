"""How urgent a request is and how long it may take: fields and headers that all dialects have."""

import pytest

from gateway.context import Lane, RequestContext, current, enter
from gateway.urgency import read_fields, read_headers
from tests.gateway.conftest import running
from tests.support.fake_inference import CLASSIFIER, KINDS, MULTIMODAL, RERANKER, FakeInference

ROUTES = {
    "/v1/embeddings": {"input": "a"},
    "/v1/embeddings/dense": {"input": "a"},
    "/v1/embeddings/sparse": {"input": "a"},
    "/v1/embeddings/hybrid": {"input": "a"},
    "/v1/embeddings/similarity": {"left": "a", "right": "b"},
    "/embed": {"inputs": "a"},
    "/embed_sparse": {"inputs": "a"},
    "/similarity": {"inputs": {"source_sentence": "a", "sentences": ["b"]}},
    "/tokenize": {"inputs": "a"},
    "/decode": {"ids": [1]},
    "/predict": {"inputs": "a", "model": "org/classifier"},
    "/": {"inputs": "a"},
    "/v2/embed": {"texts": ["a"]},
    "/v1/embed": {"texts": ["a"]},
    "/v1/rerank": {"query": "a", "documents": ["b"], "model": "org/reranker"},
    "/rerank": {"query": "a", "texts": ["b"], "model": "org/reranker"},
    "/v2/rerank": {"query": "a", "documents": ["b"], "model": "org/reranker"},
    "/v1/reranker": {"query": "a", "documents": ["b"], "model": "org/reranker"},
    "/v1/score": {"text_1": "a", "text_2": "b", "model": "org/reranker"},
    "/v1/classify": {"input": "a", "model": "org/classifier"},
    "/v1/classifier": {"input": "a", "model": "org/classifier"},
}


class Noting(FakeInference):
    """Keeps what it knew of each request."""

    def __init__(self):
        super().__init__([KINDS, RERANKER, CLASSIFIER, MULTIMODAL])
        self.known_of = []

    async def infer(self, *arguments, **options):
        if (context := current()) is not None:
            left = None if context.deadline is None else round(context.deadline - context.received_at, 3)
            self.known_of.append((context.lane, left))
        return await super().infer(*arguments, **options)


@pytest.fixture
async def inference():
    return Noting()


@pytest.fixture
async def client(inference):
    async with running(inference) as made:
        yield made


@pytest.mark.parametrize("path", ROUTES)
async def test_every_dialect_takes_them(client, inference, path):
    body = ROUTES[path]
    answer = await client.post(path, json={**body, "timeout": 2.5, "priority": "bulk"})
    assert answer.status_code == 200, answer.text
    headers = {"x-request-timeout": "1.5", "x-priority": "Interactive"}
    assert (await client.post(path, json=body, headers=headers)).status_code == 200
    assert (await client.post(path, json=body)).status_code == 200
    wanted = [(Lane.BULK, 2.5), (Lane.INTERACTIVE, 1.5), (None, None)]
    assert list(dict.fromkeys(inference.known_of)) == wanted


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"timeout": 0}, "timeout is 0; it takes the seconds that an answer may take, a number above 0"),
        ({"priority": "now"}, "priority is 'now'; it takes interactive or bulk, or as vLLM a whole number"),
    ],
)
async def test_every_dialect_refuses_what_they_cannot_be(client, inference, path, wrong, message):
    answer = await client.post(path, json={**ROUTES[path], **wrong})
    assert 400 <= answer.status_code < 500
    assert message in answer.text
    assert inference.known_of == []


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", ""])
async def test_a_header_that_is_no_time(client, value):
    answer = await client.post("/v1/embeddings", json={"input": "a"}, headers={"x-request-timeout": value})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("the header x-request-timeout is ")
    assert answer.json()["error"]["param"] == "x-request-timeout"


# Tests that enter a context are async: what they set then ends with them.
def lane(own=None, header=None, field=None):
    context = RequestContext("me", lane=own)
    enter(context)
    read_headers({} if header is None else {"x-priority": header})
    read_fields({"priority": field})
    return context.lane


async def test_the_least_urgent_of_those_who_say_it_wins():
    assert lane() is None
    assert lane(field="interactive") is Lane.INTERACTIVE
    assert lane(header="interactive", field="bulk") is Lane.BULK
    assert lane(header="bulk", field="interactive") is Lane.BULK
    assert lane(own=Lane.BULK, field="interactive") is Lane.BULK, "a key for bulk work stays so"
    assert lane(own=Lane.INTERACTIVE, field="bulk") is Lane.BULK
    assert [lane(field=n) for n in (-1, 0, 5)] == [Lane.INTERACTIVE, None, Lane.BULK], "vLLM's numbers"


@pytest.mark.parametrize("value", [True, [], "1", "high", 1.5])
async def test_what_is_no_priority(value):
    with pytest.raises(Exception, match=r"priority is .*; it takes interactive or bulk"):
        lane(field=value)


@pytest.mark.parametrize("value", [True, [], "1", -3, float("nan")])
async def test_what_is_no_timeout(value):
    enter(RequestContext("me"))
    with pytest.raises(Exception, match=r"timeout is .*; it takes the seconds"):
        read_fields({"timeout": value})


@pytest.mark.parametrize(("header", "field", "least"), [("3", 2, 2), ("2", 3.5, 2), ("2", None, 2)])
async def test_the_least_time_of_those_who_say_it_wins(header, field, least):
    context = RequestContext("me")
    enter(context)
    read_headers({"x-request-timeout": header})
    read_fields({"timeout": field})
    assert context.deadline == context.received_at + least
    said = "its header x-request-timeout" if least == float(header) else "its timeout"
    assert context.time_limit == f"{least} s, {said}"
