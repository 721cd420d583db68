"""The routes of text-embeddings-inference."""

import dataclasses

import numpy as np
import pytest

from backends.contract import ErrorCode, Task
from gateway.errors import RefusedItem, ServerFault, TimedOut, Unavailable
from tests.gateway.conftest import running
from tests.support.fake_inference import KINDS, FakeInference, vector


async def post(client, path, body, status=200):
    answer = await client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


@pytest.mark.parametrize("path", ["/embed", "/", "/invocations"])
async def test_one_text_gives_a_list_of_one_vector(kinds, path):
    (row,) = await post(kinds, path, {"inputs": "hello"})
    np.testing.assert_allclose(row, vector(b"hello"), rtol=1e-6)


async def test_lists_of_texts_and_of_ids(kinds):
    rows = await post(kinds, "/embed", {"inputs": ["a", "b"], "truncate": False, "normalize": True})
    np.testing.assert_allclose(rows, [vector(b"a"), vector(b"b")], rtol=1e-6)
    assert len(await post(kinds, "/embed", {"inputs": [1, 2, 3]})) == 1
    assert len(await post(kinds, "/embed", {"inputs": [[1, 2], [3]]})) == 2
    assert len((await post(kinds, "/embed", {"inputs": "a", "dimensions": 3}))[0]) == 3


async def test_embed_is_normalised_unless_asked_otherwise():
    inference = FakeInference([KINDS])
    async with running(inference) as client:
        for fields in ({}, {"normalize": False}):
            await post(client, "/embed", {"inputs": "a", **fields})
        await post(client, "/embed_all", {"inputs": "a"})
    assert [p.get("normalize") for items, p in inference.calls if items == [b"a"]] == [True, False, None]


async def test_the_bare_address_prefers_a_dense_model():
    sparse = dataclasses.replace(KINDS, name="a", served_model_name="a", tasks=frozenset({Task.SPARSE}))
    async with running(FakeInference([sparse, KINDS])) as client:
        assert isinstance((await post(client, "/", {"inputs": "a"}))[0][0], float)
        assert await post(client, "/", {"inputs": "a", "model": "a"}) == [[{"index": 97, "value": 1.0}]]
    async with running(FakeInference([sparse])) as client:
        assert await post(client, "/", {"inputs": "a"}) == [[{"index": 97, "value": 1.0}]]


async def test_which_field_is_at_fault():
    inference = FakeInference([KINDS])
    async with running(inference) as client:
        await post(client, "/embed", {"inputs": "a"})
        inference.fault = RefusedItem("too long", item=2, reason=ErrorCode.CONTEXT_LENGTH_EXCEEDED)
        body = {"inputs": {"source_sentence": "a", "sentences": ["b", "c"]}}
        answer = await post(client, "/similarity", body, 422)
        assert answer["error"].startswith("sentences[1]: too long")
        inference.fault = RefusedItem("unknown", item=0, reason=ErrorCode.INVALID_TOKEN_ID)
        assert (await post(client, "/decode", {"ids": [5]}, 422))["error"] == "ids[0]: unknown"


async def test_sparse(kinds):
    rows = await post(kinds, "/embed_sparse", {"inputs": ["abb", "c"]})
    assert rows == [
        [{"index": 97, "value": 1.0}, {"index": 98, "value": 2.0}],
        [{"index": 99, "value": 1.0}],
    ]


async def test_every_token(kinds):
    (rows,) = await post(kinds, "/embed_all", {"inputs": "ab"})
    np.testing.assert_allclose(rows, [vector(b"a"), vector(b"b")], rtol=1e-6)


@pytest.mark.parametrize("path", ["/similarity", "/"])
async def test_similarity_is_the_cosine(kinds, path):
    body = {"inputs": {"source_sentence": "a", "sentences": ["a", "b"]}, "parameters": {"truncate": True}}
    a, b = vector(b"a"), vector(b"b")
    expected = [1, a @ b / np.linalg.norm(a) / np.linalg.norm(b)]
    np.testing.assert_allclose(await post(kinds, path, body), expected, rtol=1e-5)


async def test_tokenize_and_decode(kinds):
    rows = await post(kinds, "/tokenize", {"inputs": ["ab"]})
    assert rows == [
        [
            {"id": 97, "text": "a", "special": True, "start": None, "stop": None},
            {"id": 98, "text": "b", "special": False, "start": 1, "stop": 2},
        ]
    ]
    assert await post(kinds, "/decode", {"ids": [97, 98]}) == ["ab"]
    assert await post(kinds, "/decode", {"ids": [[97], [98]], "skip_special_tokens": False}) == ["a", "b"]
    assert "takes token ids" in (await post(kinds, "/decode", {"ids": "ab"}, 422))["error"]
    assert "takes texts" in (await post(kinds, "/tokenize", {"inputs": [[1]]}, 422))["error"]


async def test_info(kinds):
    answer = (await kinds.get("/info")).json()
    assert answer["model_id"] == "org/m3"
    assert answer["model_sha"] == "abc"
    assert answer["model_type"] == {"embedding": {"pooling": "cls"}}
    assert answer["auto_truncate"] is False
    assert answer["max_client_batch_size"] == 10
    other = (await kinds.get("/info", params={"model": "org/late"})).json()
    assert other["model_type"] == {"embedding": {"pooling": "colbert"}}
    assert (await kinds.get("/info", params={"model": "none"})).status_code == 404


async def test_truncation_travels_in_either_spelling():
    inference = FakeInference([KINDS])
    async with running(inference) as client:
        for fields in (
            {},
            {"truncate": True},
            {"truncate": True, "truncation_direction": "Left"},
            {"truncate": True, "truncation_direction": "right"},
            {"truncate": False},
            {"truncation_direction": "Right"},
        ):
            await post(client, "/embed", {"inputs": "a", **fields})
    asked = [p.get("truncation") for items, p in inference.calls if items == [b"a"]]
    assert asked == [None, "right", "left", "right", "error", None]


async def test_what_was_cut_is_told_in_a_header(kinds):
    answer = await kinds.post("/embed", json={"inputs": ["a", "b" * 20, "c" * 17]})
    assert answer.headers["x-truncated-inputs"] == "1,2"
    assert "x-truncated-inputs" not in (await kinds.post("/embed", json={"inputs": "a"})).headers


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "text"),
    [
        ("/embed", {"inputs": []}, 400, "Empty", "inputs is an empty list"),
        ("/embed", {"inputs": [""]}, 400, "Empty", "inputs[0] is an empty string"),
        ("/embed", {"inputs": 3}, 422, "Validation", "inputs is a number"),
        ("/embed", {}, 422, "Validation", "the field inputs is missing"),
        ("/embed", {"inputs": ["a", 3]}, 422, "Validation", "inputs[1] is a number"),
        ("/embed", {"inputs": "a", "truncation_direction": "up"}, 422, "Validation", "truncation_direction"),
        ("/embed", {"inputs": ["a"] * 11}, 422, "Validation", "at most 10 can be sent"),
        ("/embed", {"inputs": "a", "model": "x"}, 404, "Validation", "the model 'x' does not exist"),
        (
            "/embed",
            {"inputs": "a", "model": "org/late"},
            400,
            "Validation",
            "does not serve embed; it serves colbert",
        ),
        ("/embed_sparse", {"inputs": "a", "model": "org/late"}, 400, "Validation", "does not serve sparse"),
        (
            "/similarity",
            {"inputs": {"source_sentence": "a"}},
            422,
            "Validation",
            "inputs.sentences is missing",
        ),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, 400, "Empty", "sentences is"),
        ("/tokenize", {"inputs": ["a" * 200_000] * 2}, 413, "Validation", "inputs has 400000 bytes of text"),
        ("/tokenize", {"inputs": ""}, 400, "Empty", "inputs[0]"),
        ("/decode", {"ids": [-1]}, 422, "Validation", "-1 is no token id"),
    ],
)
async def test_errors_have_its_own_body(kinds, path, body, status, kind, text):
    answer = await post(kinds, path, body, status)
    assert set(answer) == {"error", "error_type"}
    assert answer["error_type"] == kind
    assert text in answer["error"]


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        (Unavailable("gone"), 503, "Unhealthy"),
        (TimedOut("slow"), 504, "Backend"),
        (ServerFault("broken"), 424, "Backend"),
        (
            RefusedItem("too long", item=2, reason=ErrorCode.CONTEXT_LENGTH_EXCEEDED),
            422,
            "Validation",
        ),
    ],
)
async def test_faults_of_the_server(fault, status, kind):
    inference = FakeInference([KINDS])
    async with running(inference) as client:
        await post(client, "/embed", {"inputs": "a"})
        inference.fault = fault
        answer = await post(client, "/embed", {"inputs": "a"}, status)
    assert answer["error_type"] == kind
    if status == 422:
        assert answer["error"] == 'inputs[2]: too long. Send "truncate": true to have it cut.'


async def test_a_body_that_is_not_json(kinds):
    answer = await kinds.post("/embed", content=b"{")
    assert answer.status_code == 422
    assert answer.json()["error_type"] == "Validation"
