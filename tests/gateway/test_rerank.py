"""Reranking, scores and classes in everybody's shape."""

from dataclasses import replace

import numpy as np
import pytest

from backends.contract import ErrorCode
from gateway.errors import RefusedItem, ServerFault
from gateway.scoring import activate
from tests.gateway.conftest import running
from tests.support.fake_inference import CLASSIFIER, KINDS, PIPELINE, RERANKER, FakeInference, vector

QUESTION = {"query": "abc", "documents": ["xyz", "abcd", "a", "ab"]}
# Letters that each document shares with the query.
LOGITS = [0.0, 3.0, 1.0, 2.0]


def sigmoid(x):
    return 1 / (1 + np.exp(-np.array(x)))


@pytest.fixture
async def inference():
    return FakeInference([PIPELINE, RERANKER, CLASSIFIER, KINDS])


@pytest.fixture
async def client(inference):
    async with running(inference, max_documents=20) as made:
        yield made


async def post(client, path, body, status=200):
    answer = await client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_the_seed_s_shape(client):
    answer = await post(client, "/v1/reranker", QUESTION)
    assert answer == {
        "results": [
            {"index": 1, "relevance_score": 3.0, "document": "abcd"},
            {"index": 3, "relevance_score": 2.0, "document": "ab"},
            {"index": 2, "relevance_score": 1.0, "document": "a"},
            {"index": 0, "relevance_score": 0.0, "document": "xyz"},
        ],
        "total_tokens": 22,
        "model": "org/reranker",
    }


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"normalize": True}, sigmoid([3, 2, 1, 0])),
        ({"sorted": False}, LOGITS),
        ({"sorted": False, "top_k": 2}, LOGITS[:2]),
        ({"top_k": 2}, [3, 2]),
        ({"top_n": 1}, [3]),
        ({"top_n": 0}, [3, 2, 1, 0]),
        ({"top_n": 99}, [3, 2, 1, 0]),
    ],
)
async def test_options_of_the_seed_s_shape(client, fields, expected):
    answer = await post(client, "/v1/reranker", {**QUESTION, **fields, "return_documents": False})
    np.testing.assert_allclose([row["relevance_score"] for row in answer["results"]], expected, rtol=1e-6)
    assert all("document" not in row for row in answer["results"])


async def test_the_shape_of_cohere_jina_and_vllm(client):
    answer = await post(client, "/v1/rerank", {**QUESTION, "top_n": 2, "model": "org/reranker"})
    assert [(row["index"], row["document"]) for row in answer["results"]] == [
        (1, {"text": "abcd"}),
        (3, {"text": "ab"}),
    ]
    np.testing.assert_allclose([row["relevance_score"] for row in answer["results"]], sigmoid([3, 2]))
    assert answer["usage"] == {"prompt_tokens": 22, "total_tokens": 22}
    assert answer["meta"]["billed_units"] == {"search_units": 1}
    assert answer["object"] == "list"
    assert "data" not in answer
    bare = await post(client, "/v2/rerank", QUESTION)
    assert "document" not in bare["results"][0]
    assert bare["meta"]["api_version"] == {"version": "2"}


async def test_voyage_s_shape(client):
    answer = await post(client, "/v1/rerank", {**QUESTION, "top_k": None, "truncation": True})
    assert [row["index"] for row in answer["data"]] == [1, 3, 2, 0]
    assert answer["data"][0]["document"] == "abcd"


async def test_infinity_s_shape(client):
    answer = await post(client, "/infinity/rerank", {**QUESTION, "raw_scores": True})
    assert answer["object"] == "rerank"
    assert answer["results"][0] == {"index": 1, "relevance_score": 3.0, "document": "abcd"}
    assert (await post(client, "/rerank", QUESTION))["object"] == "rerank"


async def test_sglang_s_shape(client):
    answer = await post(client, "/v1/rerank", {**QUESTION, "instruct": "find", "top_n": 1})
    assert answer == [{"score": pytest.approx(sigmoid(3)), "document": "abcd", "index": 1, "meta_info": {}}]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v1/reranker"])
async def test_text_embeddings_inference_s_shape(client, path):
    body = {"query": "abc", "texts": QUESTION["documents"], "truncate": True}
    answer = await post(client, path, body)
    assert [row["index"] for row in answer] == [1, 3, 2, 0]
    np.testing.assert_allclose([row["score"] for row in answer], sigmoid([3, 2, 1, 0]))
    assert set(answer[0]) == {"index", "score"}
    raw = await post(client, path, {**body, "raw_scores": True, "return_text": True})
    assert raw[0] == {"index": 1, "score": 3.0, "text": "abcd"}


async def test_documents_in_objects(client):
    documents = [{"text": "xyz", "id": 7}, {"text": "abcd"}, "a", {"text": "ab"}]
    assert (await post(client, "/v1/reranker", {"query": {"text": "abc"}, "documents": documents}))[
        "results"
    ] == (await post(client, "/v1/reranker", QUESTION))["results"]
    fields = {
        "query": "abc",
        "documents": [{"title": "t", "body": "b", "x": 1}],
        "rank_fields": ["title", "body"],
    }
    (row,) = (await post(client, "/v1/reranker", fields))["results"]
    assert row["document"] == "title: t\nbody: b"


async def test_what_was_cut_is_told(client):
    body = {"query": "abc", "documents": ["a" * 30, "b"]}
    rows = (await post(client, "/v1/rerank", body))["results"]
    assert {row["index"]: row.get("truncated") for row in rows} == {0: True, 1: None}
    answer = await client.post("/rerank", json={"query": "abc", "texts": ["b", "a" * 30]})
    assert answer.headers["x-truncated-inputs"] == "1"


async def test_how_truncation_is_asked_for(client, inference):
    for fields in (
        {},
        {"truncation": False},
        {"truncate_only_documents": True},
        {"truncation_side": "left"},
        {"max_tokens_per_doc": 9, "max_tokens_per_query": 5},
        {"truncate_prompt_tokens": 12},
    ):
        await post(client, "/v1/rerank", {**QUESTION, **fields})
    await post(client, "/rerank", {"query": "a", "texts": ["b"]})
    await post(client, "/rerank", {"query": "a", "texts": ["b"], "truncate": False})
    asked = [p for items, p in inference.calls if isinstance(items[0], tuple)]
    assert asked == [
        {"truncation": "right"},
        {"truncation": "error"},
        {"truncation": "document"},
        {"truncation": "left"},
        {"truncation": "right", "max_query_tokens": 5, "max_document_tokens": 9},
        {"truncation": "right", "max_tokens": 12},
        {"truncation": "right"},
        {"truncation": "error"},
    ]


async def test_an_embedding_model_answers_by_similarity(client):
    answer = await post(client, "/v1/rerank", {**QUESTION, "model": "org/tiny"})
    got = {row["index"]: row["relevance_score"] for row in answer["results"]}
    for i, document in enumerate(QUESTION["documents"]):
        assert got[i] == pytest.approx(vector(b"abc") @ vector(document.encode()), rel=1e-5)
    sparse = await post(client, "/v1/rerank", {**QUESTION, "model": "org/m3", "weights": {"sparse": 1}})
    assert [row["relevance_score"] for row in sparse["results"]] == [3.0, 2.0, 1.0, 0.0]


async def test_without_a_reranker_an_embedding_model_is_taken():
    async with running(FakeInference([CLASSIFIER, PIPELINE])) as client:
        assert (await post(client, "/v1/rerank", QUESTION))["model"] == "org/tiny"
    async with running(FakeInference([CLASSIFIER])) as client:
        answer = await post(client, "/v1/rerank", QUESTION, 400)
    assert answer["message"] == "the model org/classifier is no reranker: it is a classifier with 3 labels"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"documents": ["a"]}, "the field query is missing"),
        ({"query": "", "documents": ["a"]}, "query is an empty string"),
        ({"query": "a"}, "the field documents is missing"),
        ({"query": "a", "documents": []}, "documents is an empty list"),
        ({"query": "a", "documents": ["b", 3]}, "documents[1] is a number; it takes a text"),
        ({"query": ["a"], "documents": ["b"]}, "query is a list; it takes a text"),
        ({"query": "a", "documents": ["b"] * 21}, "documents has 21 texts; at most 20"),
        ({"query": "a", "documents": ["b"], "top_n": -1}, "top_n is -1"),
        ({"query": "a", "documents": ["b"], "model": "nothing"}, "the model 'nothing' does not exist"),
        (
            {"query": "a", "documents": ["b"], "model": "org/classifier"},
            "no reranker: it is a classifier with 3",
        ),
    ],
)
async def test_bad_input_in_each_dialect_s_own_body(client, body, text):
    status = 404 if body.get("model") == "nothing" else 400
    seed = await post(client, "/v1/reranker", body, status)
    assert set(seed) == {"error_code", "error_code_str", "message"}
    for path in ("/v1/rerank", "/rerank", "/v2/rerank"):
        everybody = await post(client, path, body, status)
        assert everybody["message"] == everybody["detail"] == everybody["error"]["message"] == seed["message"]
    assert text in seed["message"]
    if "documents" in body and body.get("query") == "a":
        texts = {**{k: v for k, v in body.items() if k != "documents"}, "texts": body["documents"]}
        answer = await client.post("/rerank", json=texts)
        assert answer.status_code in (400, 404, 422)
        assert set(answer.json()) == {"error", "error_type"}


async def test_a_pair_that_the_server_refuses(client, inference):
    await post(client, "/v1/rerank", QUESTION)
    inference.fault = RefusedItem("too long", item=2, reason=ErrorCode.CONTEXT_LENGTH_EXCEEDED)
    answer = await post(client, "/v1/rerank", QUESTION, 400)
    assert answer["message"].startswith("documents[2]: too long")
    inference.fault = ServerFault("broken")
    assert (await post(client, "/v2/rerank", QUESTION, 500))["message"] == "broken"


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize(
    ("one", "two"), [("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")]
)
async def test_scores_of_pairs(client, path, one, two):
    answer = await post(client, path, {one: "abc", two: ["a", "ab"], "use_activation": False})
    assert answer["data"] == [
        {"index": 0, "object": "score", "score": 1.0},
        {"index": 1, "object": "score", "score": 2.0},
    ]
    answer = await post(client, path, {one: ["abc", "xy"], two: ["a", "xy"]})
    np.testing.assert_allclose([row["score"] for row in answer["data"]], sigmoid([1, 2]))


async def test_scores_by_similarity(client):
    body = {"text_1": ["a", "b"], "text_2": ["b", "c"], "model": "org/tiny"}
    answer = await post(client, "/score", body)
    expected = [vector(b"a") @ vector(b"b"), vector(b"b") @ vector(b"c")]
    np.testing.assert_allclose([row["score"] for row in answer["data"]], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"text_1": ["a", "b"], "text_2": ["c"]}, "text_1 has 2 texts and text_2 has 1"),
        ({"text_1": "a"}, "is missing"),
        ({"text_1": "a", "text_2": []}, "text_2 is an empty list"),
        ({"query": "a", "items": ["b"], "label_token_ids": [1]}, "label_token_ids are not served"),
    ],
)
async def test_bad_scores(client, body, text):
    assert text in (await post(client, "/score", body, 400))["error"]["message"]


@pytest.mark.parametrize("name", ["instruction", "instruct"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/rerank", QUESTION),
        ("/v1/reranker", QUESTION),
        ("/v2/rerank", QUESTION),
        ("/rerank", {"query": "a", "texts": ["b"]}),
        ("/v1/score", {"text_1": "a", "text_2": ["b", "c"]}),
        ("/v1/classifier", {"input": [["a", "b"]]}),
        ("/v1/classify", {"input": [["a", "b"]]}),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["b", "c"]}),
    ],
)
async def test_an_instruction_travels(path, body, name):
    inference = FakeInference([replace(RERANKER, takes_instructions=True)])
    async with running(inference) as client:
        await post(client, path, {**body, name: "Find it"})
        assert inference.calls[-1][1]["instruction"] == "Find it"
        await post(client, path, {**body, name: ""})
        assert "instruction" not in inference.calls[-1][1]


async def test_instruct_is_not_looked_at_by_models_without_instructions(client, inference):
    """As at SGLang and RTP-LLM, whose word it is; our own word reaches the model, which refuses it."""
    for path in ("/v1/reranker", "/v1/rerank"):
        await post(client, path, {**QUESTION, "instruct": "Find it"})
        assert "instruction" not in inference.calls[-1][1]
    await post(client, "/v1/rerank", {**QUESTION, "instruction": "Find it"})
    assert inference.calls[-1][1]["instruction"] == "Find it"


async def test_only_documents_are_cut_of_an_embedding_model(client, inference):
    body = {**QUESTION, "model": "org/tiny", "truncate_only_documents": True}
    await post(client, "/v1/rerank", body)
    told = {
        items[0]: parameters["truncation"]
        for items, parameters in inference.calls
        if len(items) != 1 or items[0] == b"abc"
    }
    assert told == {
        b"abc": "error",
        b"xyz": "right",
    }


async def test_two_names_of_an_instruction(client):
    body = {**QUESTION, "instruction": "a", "instruct": "b"}
    assert "two names of one thing" in (await post(client, "/v1/rerank", body, 400))["message"]
    await post(client, "/v1/reranker", {**body, "instruct": "a"})


async def test_an_instruction_is_for_the_query_of_an_embedding_model(client, inference):
    await post(client, "/v1/rerank", {**QUESTION, "model": "org/tiny", "instruction": "Find it"})
    by_role = {parameters.get("role"): parameters for _, parameters in inference.calls}
    assert by_role["query"]["instruction"] == "Find it"
    assert "instruction" not in by_role["document"]


async def test_a_model_that_gives_probabilities_does_so_in_rtp_llm_s_shape():
    words = replace(RERANKER, score_is_probability=True)
    async with running(FakeInference([words])) as client:
        for fields, expected in (
            ({}, sigmoid(LOGITS)),
            ({"normalize": True}, sigmoid(LOGITS)),
            ({"normalize": False}, LOGITS),
        ):
            answer = await post(client, "/v1/reranker", {**QUESTION, "sorted": False, **fields})
            got = [row["relevance_score"] for row in answer["results"]]
            np.testing.assert_allclose(got, expected, rtol=1e-5)


async def test_the_seed_s_classifier(client):
    answer = await post(client, "/v1/classifier", {"input": ["ab", "abc"], "model": "org/classifier"})
    assert answer["score"] == [[2.0, 1.0, 0.0], [3.0, 2.0, 1.0]]
    assert answer["labels"] == ["good", "bad", "ugly"]
    pairs = await post(client, "/v1/classifier", {"input": [["abc", "ab"]], "model": "org/reranker"})
    assert pairs["score"] == [[2.0]]


@pytest.mark.parametrize("path", ["/classify", "/v1/classify"])
async def test_classes_of_vllm_and_infinity(client, path):
    body = {"input": ["ab"], "model": "org/classifier"}
    (row,) = (await post(client, path, body))["data"]
    probabilities = np.exp([2, 1, 0]) / np.exp([2, 1, 0]).sum()
    assert (row["index"], row["label"], row["num_classes"]) == (0, "good", 3)
    np.testing.assert_allclose(row["probs"], probabilities, rtol=1e-5)
    (raw,) = (await post(client, path, {**body, "use_activation": False}))["data"]
    assert raw["probs"] == [2.0, 1.0, 0.0]
    answer = await post(client, path, {**body, "raw_scores": False})
    assert answer["object"] == "classify"
    assert [pair["label"] for pair in answer["data"][0]] == ["good", "bad", "ugly"]
    np.testing.assert_allclose([pair["score"] for pair in answer["data"][0]], probabilities, rtol=1e-5)


async def test_infinity_s_classes_say_in_a_header_what_was_cut(client):
    body = {"input": ["ab", "a" * 17], "model": "org/classifier"}
    (_, row) = (await post(client, "/v1/classify", body))["data"]
    assert row["truncated"] is True
    answer = await client.post("/v1/classify", json={**body, "raw_scores": False})
    assert answer.headers["x-truncated-inputs"] == "1"


async def test_predict_and_its_flat_pair(client):
    model = {"model": "org/classifier", "raw_scores": True}
    one = await post(client, "/predict", {"inputs": "ab", **model})
    assert one == [
        {"score": 2.0, "label": "good"},
        {"score": 1.0, "label": "bad"},
        {"score": 0.0, "label": "ugly"},
    ]
    pair = await post(client, "/predict", {"inputs": ["abc", "ab"], **model})
    assert pair == one, "two letters are in both: a pair, not two texts"
    batch = await post(client, "/predict", {"inputs": [["ab"], ["abc"]], **model})
    assert [rows[0]["score"] for rows in batch] == [2.0, 3.0]
    pairs = await post(client, "/predict", {"inputs": [["abc", "ab"]], **model})
    assert pairs == [one]


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/v1/classifier", {"input": []}, 400, "input is an empty list"),
        ("/v1/classifier", {"input": 3}, 400, "input takes a text, or a list of texts or of pairs"),
        ("/v1/classifier", {"input": [["a", "b", "c"]]}, 400, "input[0] has 3 texts; a pair has two"),
        (
            "/v1/classifier",
            {"input": [["a", "b"], "c"]},
            400,
            "input[1] is a text, and those before it are not",
        ),
        ("/classify", {"input": ["c", ["a", "b"]]}, 400, "input[1] is a pair, and those before it are not"),
        (
            "/classify",
            {"input": ["a"], "model": "org/tiny"},
            400,
            "org/tiny does not serve classify; it serves embed",
        ),
        ("/predict", {"inputs": ["a", "b", "c"]}, 422, "inputs is a flat list of 3 strings"),
        ("/predict", {"inputs": []}, 400, "inputs is an empty list"),
        ("/predict", {"inputs": [["a"], ["b", "c"]]}, 422, "inputs[1] is a pair"),
        (
            "/predict",
            {"inputs": "a", "truncate": True, "truncation_direction": "up"},
            422,
            "it should be 'left'",
        ),
    ],
)
async def test_bad_classes(client, path, body, status, text):
    answer = await post(client, path, body, status)
    assert text in str(answer)
    if path == "/predict":
        assert set(answer) == {"error", "error_type"}
    elif path == "/v1/classifier":
        assert set(answer) == {"error_code", "error_code_str", "message"}


def test_activations_do_not_overflow():
    logits = np.array([[1000.0, -1000.0, 0.0]], np.float32)
    np.testing.assert_allclose(activate(logits, "sigmoid"), [[1, 0, 0.5]])
    np.testing.assert_allclose(activate(logits, "softmax"), [[1, 0, 0]])
    np.testing.assert_allclose(activate(logits, "identity"), logits)
