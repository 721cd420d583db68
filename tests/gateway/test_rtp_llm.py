"""RTP-LLM's routes, and the hybrid route of our own."""

import base64
import dataclasses
import json

import numpy as np
import openai
import pytest

from backends.contract import ErrorCode, Task
from gateway.errors import RefusedItem, ServerFault
from tests.gateway.conftest import running
from tests.support.fake_inference import KINDS, PIPELINE, ROLES, FakeInference, vector


async def post(client, path, body, status=200):
    answer = await client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_dense(kinds):
    answer = await post(kinds, "/v1/embeddings/dense", {"input": ["a", "b"]})
    assert answer["object"] == "list"
    assert [(item["object"], item["index"]) for item in answer["data"]] == [
        ("embedding", 0),
        ("embedding", 1),
    ]
    np.testing.assert_allclose(
        [i["embedding"] for i in answer["data"]], [vector(b"a"), vector(b"b")], rtol=1e-6
    )
    assert answer["model"] == "org/m3"
    assert answer["usage"] == {"prompt_tokens": 2, "total_tokens": 2}


async def test_usage_stands_in_a_header_too(kinds):
    answer = await kinds.post("/v1/embeddings/dense", json={"input": "abc"})
    assert json.loads(answer.headers["USAGE"]) == {"prompt_tokens": 3, "total_tokens": 3}


async def test_sparse_by_token_and_by_id():
    inference = FakeInference([KINDS])
    async with running(inference) as client:
        # Two ids read the same: the larger weight stays.
        body = {"input": ["abbBBB"]}
        (item,) = (await post(client, "/v1/embeddings/sparse", body))["data"]
        assert item["object"] == "sparse_embedding"
        assert item["embedding"] == {"a": 1.0, "b": 3.0}
        (item,) = (await post(client, "/v1/embeddings/sparse", {**body, "return_decoded": False}))["data"]
        assert item["embedding"] == {"66": 3.0, "97": 1.0, "98": 2.0}
        asked = [items for items, parameters in inference.calls if parameters.get("text_format") == "ids"]
        assert [np.frombuffer(one, "<i4").tolist() for (one,) in asked] == [[66, 97, 98]]
        await post(client, "/v1/embeddings/sparse", {"input": ["abc"]})
        asked = [items for items, parameters in inference.calls if parameters.get("text_format") == "ids"]
        assert np.frombuffer(asked[-1][0], "<i4").tolist() == [99], "the others are known by now"


async def test_colbert(kinds):
    (item,) = (await post(kinds, "/v1/embeddings/colbert", {"input": "ab", "model": "org/m3"}))["data"]
    assert item["object"] == "colbert_embedding"
    np.testing.assert_allclose(item["embedding"], [vector(b"a"), vector(b"b")], rtol=1e-6)


async def test_a_large_colbert_answer_is_whole(kinds, monkeypatch):
    monkeypatch.setattr("gateway.wire._NUMBERS_AT_ONCE", 20)
    (item,) = (await post(kinds, "/v1/embeddings/colbert", {"input": "abcdefgh", "model": "org/m3"}))["data"]
    np.testing.assert_allclose(item["embedding"], [vector(bytes([c])) for c in b"abcdefgh"], rtol=1e-6)


async def test_input_type_becomes_a_role():
    inference = FakeInference([ROLES])
    async with running(inference) as client:
        for word in ("query", "search_query", "document", "passage", "search_document", None):
            await post(client, "/v1/embeddings/colbert", {"input": "a", "input_type": word})
        await post(client, "/v1/embeddings/colbert", {"input": "a", "input_type": "poem"}, 400)
    asked = [parameters.get("role") for items, parameters in inference.calls if items == [b"a"]]
    assert asked == ["query", "query", "document", "document", "document", None]


async def test_texts_in_objects(kinds):
    plain = await post(kinds, "/v1/embeddings/dense", {"input": ["a", "b"]})
    objects = [{"text": "a"}, {"type": "text", "text": "b"}]
    assert await post(kinds, "/v1/embeddings/dense", {"input": objects}) == plain


@pytest.mark.parametrize("fields", [{}, {"type": "dense"}, {"embedding_config": {"type": "dense"}}])
async def test_dense_similarity(kinds, fields):
    body = {"left": ["a", "b"], "right": ["c"], **fields}
    answer = await post(kinds, "/v1/embeddings/similarity", body)
    expected = [[vector(b"a") @ vector(b"c")], [vector(b"b") @ vector(b"c")]]
    np.testing.assert_allclose(answer["similarity"], expected, rtol=1e-5)
    assert answer["left_response"] is answer["right_response"] is None


async def test_both_sides_are_one_batch():
    inference = FakeInference([KINDS])
    async with running(inference) as client:
        await post(
            client, "/v1/embeddings/similarity", {"left": ["a"], "right": ["b", "c"], "type": "hybrid"}
        )
    assert [items for items, _ in inference.calls if items != [b"ready?"]] == [[b"a", b"b", b"c"]]


async def test_a_model_with_roles_gets_queries_and_documents():
    inference = FakeInference([ROLES])
    async with running(inference) as client:
        answer = await post(client, "/v1/embeddings/similarity", {"left": ["ab"], "right": ["c"]})
    calls = [(items, p["role"]) for items, p in inference.calls if "role" in p]
    assert sorted(calls) == [([b"ab"], "query"), ([b"c"], "document")]
    best = [vector(c + b"query") @ vector(b"cdocument") for c in (b"a", b"b")]
    np.testing.assert_allclose(answer["similarity"], [[np.mean(best)]], rtol=1e-5)


async def test_an_instruction_is_for_the_left_side():
    inference = FakeInference([KINDS])
    body = {"left": ["a"], "right": ["b"], "instruction": "Find it"}
    async with running(inference) as client:
        await post(client, "/v1/embeddings/similarity", body)
    told = {items[0]: parameters for items, parameters in inference.calls}
    assert (told[b"a"]["instruction"], told[b"a"]["role"]) == ("Find it", "query")
    assert "instruction" not in told[b"b"]


async def test_sparse_and_mixed_similarity(kinds):
    body = {"left": ["aab"], "right": ["abc", "z"], "type": "sparse"}
    answer = await post(kinds, "/v1/embeddings/similarity", body)
    assert answer["similarity"] == [[3.0, 0.0]]
    parts = {
        kind: np.array((await post(kinds, "/v1/embeddings/similarity", {**body, "type": kind}))["similarity"])
        for kind in ("dense", "sparse", "colbert")
    }
    for weights, factors in (
        (None, {"dense": 0.4, "sparse": 0.2, "colbert": 0.4}),
        ([1, 2, 1], {"dense": 0.25, "sparse": 0.5, "colbert": 0.25}),
        ({"sparse": 3, "colbert": 1}, {"sparse": 0.75, "colbert": 0.25}),
        ({"sparse": 1}, {"sparse": 1}),
    ):
        asked = {**body, "type": "hybrid", "weights": weights}
        got = (await post(kinds, "/v1/embeddings/similarity", asked))["similarity"]
        expected = sum(parts[kind] * factor for kind, factor in factors.items())
        np.testing.assert_allclose(got, expected, rtol=1e-5)


async def test_weights_alone_ask_for_a_hybrid(kinds):
    body = {"left": ["aab"], "right": ["abc"], "weights": {"sparse": 1}}
    assert (await post(kinds, "/v1/embeddings/similarity", body))["similarity"] == [[3.0]]


async def test_more_work_than_one_request_may_ask_for():
    async with running(FakeInference([KINDS]), max_products=100) as client:
        body = {"left": ["a"], "right": ["b"], "type": "colbert"}
        await post(client, "/v1/embeddings/similarity", body)
        body["left"] = ["a" * 20]
        answer = await post(client, "/v1/embeddings/similarity", body, 413)
    assert "the scores take 1.6e+02 multiplications, and one request may take 1.0e+02" in answer["message"]


async def test_return_response(kinds):
    body = {"left": ["a"], "right": ["b"], "return_response": True, "type": "sparse"}
    answer = await post(kinds, "/v1/embeddings/similarity", body)
    assert answer["left_response"]["data"] == [
        {"object": "sparse_embedding", "embedding": {"a": 1.0}, "index": 0}
    ]
    assert answer["right_response"]["usage"]["total_tokens"] == 1


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        ("dense", {}, "the field input is missing"),
        ("dense", {"input": []}, "input is an empty list"),
        ("dense", {"input": ["a", ""]}, "input[1] is an empty string"),
        ("sparse", {"input": "a", "return_decoded": "no"}, "return_decoded is 'no'"),
        ("sparse", {"input": "a", "model": "org/late"}, "org/late does not serve sparse; it serves colbert"),
        ("similarity", {"left": ["a"]}, "the field right is missing"),
        ("similarity", {"left": ["a"], "right": []}, "right is an empty list"),
        ("similarity", {"left": ["a"], "right": [[1]]}, "one of left and right holds texts"),
        ("similarity", {"left": "a", "right": "b", "type": "euclid"}, "type is 'euclid'"),
        (
            "similarity",
            {"left": "a", "right": "b", "type": "hybrid", "weights": [1, 2]},
            "weights has 2 numbers",
        ),
        (
            "similarity",
            {"left": "a", "right": "b", "type": "hybrid", "weights": [0, 0, 0]},
            "weights must be",
        ),
        (
            "similarity",
            {"left": "a", "right": "b", "type": "hybrid", "weights": [1, -1, 1]},
            "weights must be",
        ),
        (
            "similarity",
            {"left": "a", "right": "b", "type": "hybrid", "model": "org/late"},
            "does not serve embed",
        ),
    ],
)
async def test_bad_input(kinds, path, body, text):
    answer = await post(kinds, f"/v1/embeddings/{path}", body, 400)
    assert set(answer) == {"error_code", "error_code_str", "message"}
    assert answer["error_code_str"] == "507_ERROR_INPUT_FORMAT_ERROR"
    assert text in answer["message"]


async def test_which_side_is_at_fault():
    inference = FakeInference([KINDS])
    async with running(inference) as client:
        await post(client, "/v1/embeddings/dense", {"input": "a"})
        for item, place in ((1, "left[1]"), (2, "right[0]"), (4, "right[2]")):
            inference.fault = RefusedItem("too long", item=item, reason=ErrorCode.CONTEXT_LENGTH_EXCEEDED)
            body = {"left": ["a", "b"], "right": ["c", "d", "e"]}
            answer = await post(client, "/v1/embeddings/similarity", body, 400)
            assert answer["message"].startswith(f"{place}: too long")
            assert answer["error_code_str"] == "511_LONG_PROMPT_ERROR"
        inference.fault = ServerFault("broken")
        answer = await post(client, "/v1/embeddings/dense", {"input": "a"}, 500)
        assert answer["error_code"] == 606


async def test_hybrid_gives_any_subset(kinds):
    answer = await post(kinds, "/v1/embeddings/hybrid", {"input": ["ab"], "outputs": ["sparse"]})
    assert answer["data"] == [
        {"object": "hybrid_embedding", "index": 0, "sparse": {"indices": [97, 98], "values": [1.0, 1.0]}}
    ]
    (item,) = (await post(kinds, "/v1/embeddings/hybrid", {"input": ["ab"], "model": "org/m3"}))["data"]
    assert set(item) == {"object", "index", "dense", "sparse", "colbert"}
    (item,) = (await post(kinds, "/v1/embeddings/hybrid", {"input": ["ab"], "model": "org/late"}))["data"]
    assert set(item) == {"object", "index", "colbert"}, "all that the model has"


async def test_hybrid_of_a_model_without_any_of_them():
    tokens = dataclasses.replace(KINDS, tasks=frozenset({Task.TOKENS}))
    async with running(FakeInference([tokens])) as client:
        error = (await post(client, "/v1/embeddings/hybrid", {"input": "a"}, 400))["error"]
    assert error["message"] == "the model org/m3 serves tokens, and none of dense, sparse, colbert"


async def test_hybrid_in_base64(kinds):
    body = {"input": ["ab"], "outputs": ["dense", "colbert"], "encoding_format": "base64"}
    (item,) = (await post(kinds, "/v1/embeddings/hybrid", body))["data"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(item["dense"]), "<f4"), vector(b"ab"))
    vectors = np.frombuffer(base64.b64decode(item["colbert"]["data"]), "<f4")
    np.testing.assert_array_equal(vectors.reshape(item["colbert"]["shape"]), [vector(b"a"), vector(b"b")])


@pytest.mark.parametrize(
    ("body", "text", "param"),
    [
        ({"input": "a", "outputs": []}, "outputs is []", "outputs"),
        ({"input": "a", "outputs": ["spars"]}, "outputs.0 is 'spars'", "outputs.0"),
        ({"input": "a", "top_k": 0}, "top_k is 0", "top_k"),
        ({"input": "a", "outputs": ["dense"], "model": "org/late"}, "does not serve embed", "model"),
    ],
)
async def test_bad_hybrids(kinds, body, text, param):
    error = (await post(kinds, "/v1/embeddings/hybrid", body, 400))["error"]
    assert text in error["message"]
    assert error["param"] == param


async def test_embedding_types_of_the_openai_route(kinds):
    sdk = openai.AsyncOpenAI(api_key="none", base_url="http://gateway/v1", http_client=kinds, max_retries=0)
    types = {"embedding_types": ["dense", "sparse", "colbert"]}
    answer = await sdk.embeddings.create(model="org/m3", input=["ab"], extra_body=types)
    np.testing.assert_allclose(answer.data[0].embedding, vector(b"ab"), rtol=1e-6)
    assert answer.data[0].sparse == {"indices": [97, 98], "values": [1.0, 1.0]}
    only = await sdk.embeddings.create(
        model="org/m3", input=["ab"], extra_body={"embedding_types": ["sparse"]}
    )
    assert only.data[0].sparse == answer.data[0].sparse
    with pytest.raises(openai.BadRequestError, match="embedding_types"):
        await sdk.embeddings.create(model="org/m3", input=["ab"], extra_body={"embedding_types": []})


async def test_no_model_serves_it():
    async with running(FakeInference([PIPELINE])) as client:
        answer = await post(client, "/v1/embeddings/sparse", {"input": "a"}, 400)
    assert answer["message"] == "no model here serves sparse; org/tiny serves embed"


async def test_what_was_cut_of_either_side_is_told(kinds):
    body = {"left": ["a", "b" * 20], "right": ["c" * 30]}
    answer = await post(kinds, "/v1/embeddings/similarity", body)
    assert answer["truncated"] == {"left": [1], "right": [0]}
    assert "truncated" not in await post(kinds, "/v1/embeddings/similarity", {"left": "a", "right": "b"})


async def test_colbert_in_base64(kinds):
    body = {"input": "ab", "model": "org/m3", "encoding_format": "base64"}
    (item,) = (await post(kinds, "/v1/embeddings/colbert", body))["data"]
    vectors = np.frombuffer(base64.b64decode(item["embedding"]["data"]), "<f4")
    np.testing.assert_array_equal(vectors.reshape(item["embedding"]["shape"]), [vector(b"a"), vector(b"b")])


@pytest.mark.parametrize(
    ("path", "fields", "text"),
    [
        ("colbert", {"dimensions": 4}, "dimensions is for dense embeddings, which are not asked for here"),
        ("dense", {"top_k": 4}, "top_k is for sparse embeddings, which are not asked for here"),
        ("similarity", {"embedding_config": 3}, "embedding_config is 3: it should be an object"),
        ("similarity", {"type": "hybrid", "weights": {"dense": "x"}}, "weights.dense is 'x'"),
        ("sparse", {"model": "org/late"}, "it serves colbert; sparse is served by org/m3"),
    ],
)
async def test_what_cannot_be_honoured_is_refused(kinds, path, fields, text):
    body = {"input": "a", "left": "a", "right": "b", "model": "org/m3", **fields}
    answer = await post(kinds, f"/v1/embeddings/{path}", body, 400)
    assert text in answer["message"]
