"""Rerankers and classifiers through the real server, against the libraries that define them."""

import functools
import json
import warnings

import numpy as np
import pytest
import torch
import tritonclient.grpc
from sentence_transformers import CrossEncoder
from transformers import pipeline

from tests.support.oracle import ask
from tests.support.sentences import sentences

QUERY = "what is the value"
DOCUMENTS = [
    "a class, an object!",
    "x",
    "this is it; for and of to the query return value class object in a of to",
    "the value of the class is in the object",
    "x",
]
RERANKERS = ("bge-reranker", "ms-marco", "modernbert", "deberta")
TOLERANCE = 1e-5


def quiet(make, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **kwargs)


@functools.cache
def cross_encoder(path):
    return quiet(CrossEncoder, path, device="cpu", local_files_only=True)


def post(serving, path, body):
    status, answer = serving.post(body, path)
    assert status == 200, answer
    return answer


def scores_of(answer, key="relevance_score"):
    """Scores in the order of the request."""
    return [row[key] for row in sorted(answer, key=lambda row: row["index"])]


@pytest.mark.parametrize("model", RERANKERS)
def test_scores_equal_the_cross_encoder(serving_classifiers, classifiers, model):
    encoder = cross_encoder(str(classifiers / model))
    pairs = [(QUERY, document) for document in DOCUMENTS]
    body = {"model": model, "query": QUERY, "documents": DOCUMENTS}
    got = scores_of(post(serving_classifiers, "/v1/rerank", body)["results"])
    np.testing.assert_allclose(got, encoder.predict(pairs), atol=TOLERANCE)
    raw = scores_of(post(serving_classifiers, "/v1/reranker", body)["results"])
    expected = encoder.predict(pairs, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(raw, expected, atol=TOLERANCE)
    assert np.std(expected) > 0.01, "the documents must differ"
    assert (model == "ms-marco") == np.allclose(got, raw), "its checkpoint says Identity"


def test_scores_equal_flag_reranker(serving_classifiers, classifiers):
    pairs = [[QUERY, document] for document in DOCUMENTS]
    expected = ask("flag_reranker", path=str(classifiers / "bge-reranker"), pairs=pairs, max_length=64)
    body = {"model": "bge-reranker", "query": QUERY, "documents": DOCUMENTS, "sorted": False}
    raw = post(serving_classifiers, "/v1/reranker", body)["results"]
    np.testing.assert_allclose([row["relevance_score"] for row in raw], expected["raw"], atol=TOLERANCE)
    unit = post(serving_classifiers, "/v1/reranker", {**body, "normalize": True})["results"]
    np.testing.assert_allclose(
        [row["relevance_score"] for row in unit], expected["normalized"], atol=TOLERANCE
    )


def test_cutting_documents_only_equals_flag_reranker(serving_classifiers, classifiers):
    pairs = [["the value " * 30, "x " * 40], ["the value", "a class " * 60], ["the value " * 40, "x"]]
    expected = ask("flag_reranker", path=str(classifiers / "bge-reranker"), pairs=pairs, max_length=64)
    for (query, document), score in zip(pairs, expected["raw"], strict=True):
        body = {
            "model": "bge-reranker",
            "query": query,
            "documents": [document],
            "truncate_only_documents": True,
        }
        (row,) = post(serving_classifiers, "/v1/reranker", body)["results"]
        assert row["relevance_score"] == pytest.approx(score, abs=TOLERANCE)
        assert row["truncated"] is True


def test_negative_control_the_order_of_a_pair_matters(serving_classifiers, classifiers):
    encoder = cross_encoder(str(classifiers / "ms-marco"))
    swapped = [(document, QUERY) for document in DOCUMENTS]
    body = {"model": "ms-marco", "query": QUERY, "documents": DOCUMENTS}
    got = scores_of(post(serving_classifiers, "/v1/rerank", body)["results"])
    assert np.abs(got - encoder.predict(swapped)).max() > 0.01


@pytest.mark.parametrize("model", ["multi-label", "multi-class", "bge-reranker"])
def test_classes_equal_the_text_classification_pipeline(serving_classifiers, classifiers, model):
    classify = quiet(pipeline, "text-classification", model=str(classifiers / model), device="cpu")
    expected = classify(DOCUMENTS, top_k=None)
    got = [post(serving_classifiers, "/predict", {"model": model, "inputs": text}) for text in DOCUMENTS]
    for ours, theirs in zip(got, expected, strict=True):
        assert [row["label"] for row in ours] == [row["label"] for row in theirs]
        np.testing.assert_allclose(
            [row["score"] for row in ours], [row["score"] for row in theirs], atol=TOLERANCE
        )
    answer = post(serving_classifiers, "/v1/classify", {"model": model, "input": DOCUMENTS})
    for row, theirs in zip(answer["data"], expected, strict=True):
        assert row["label"] == theirs[0]["label"]
        assert max(row["probs"]) == pytest.approx(theirs[0]["score"], abs=TOLERANCE)
    raw = classify(DOCUMENTS, top_k=None, function_to_apply="none")
    logits = post(serving_classifiers, "/v1/classifier", {"model": model, "input": DOCUMENTS})["score"]
    np.testing.assert_allclose(
        [sorted(row, reverse=True) for row in logits],
        [[row["score"] for row in rows] for rows in raw],
        atol=TOLERANCE,
    )


def test_pairs_of_a_classifier(serving_classifiers, classifiers):
    encoder = cross_encoder(str(classifiers / "multi-label"))
    pairs = [[QUERY, document] for document in DOCUMENTS]
    expected = encoder.predict(pairs, activation_fn=torch.nn.Identity())
    got = post(serving_classifiers, "/v1/classifier", {"model": "multi-label", "input": pairs})["score"]
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    flat = post(
        serving_classifiers, "/predict", {"model": "multi-label", "inputs": pairs[0], "raw_scores": True}
    )
    np.testing.assert_allclose([row["score"] for row in flat], np.sort(expected[0])[::-1], atol=TOLERANCE)


@pytest.mark.parametrize("model", ["bge-reranker", "ms-marco"])
def test_long_pairs_are_cut_as_the_cross_encoder_cuts_them(serving_classifiers, classifiers, model):
    encoder = cross_encoder(str(classifiers / model))
    pairs = [("the value " * 50, "x"), ("x", "a class " * 50), ("the value " * 40, "a class " * 60)]
    for query, document in pairs:
        body = {"model": model, "query": query, "documents": ["x", document]}
        answer = post(serving_classifiers, "/v1/rerank", body)["results"]
        (cut,) = [row for row in answer if row["index"] == 1]
        assert cut["truncated"] is True
        assert cut["relevance_score"] == pytest.approx(encoder.predict([(query, document)])[0], abs=TOLERANCE)
        status, refused = serving_classifiers.post({**body, "truncation": False}, "/v1/rerank")
        assert status == 400
        assert "tokens, and this model takes 64 tokens" in refused["message"]


def test_packed_pairs_equal_one_by_one(serving_classifiers):
    body = {"model": "ms-marco", "query": QUERY, "documents": DOCUMENTS * 30, "sorted": False}
    together = [row["relevance_score"] for row in post(serving_classifiers, "/v1/rerank", body)["results"]]
    alone = [
        post(serving_classifiers, "/v1/rerank", {**body, "documents": [document]})["results"][0][
            "relevance_score"
        ]
        for document in DOCUMENTS
    ]
    np.testing.assert_allclose(together, alone * 30, atol=TOLERANCE)


def executions(serving, model):
    with tritonclient.grpc.InferenceServerClient(serving.grpc) as client:
        (stats,) = client.get_inference_statistics(f"{model}.encoder").model_stats
    return np.array([stats.inference_count, stats.execution_count])


def test_a_thousand_documents_are_few_executions(serving_classifiers, classifiers):
    documents = [text[:60] for text in sentences(200)] * 5
    before = executions(serving_classifiers, "ms-marco")
    body = {
        "model": "ms-marco",
        "query": QUERY,
        "documents": documents,
        "top_n": 7,
        "return_documents": False,
    }
    answer = post(serving_classifiers, "/v1/rerank", body)
    requests, batches = executions(serving_classifiers, "ms-marco") - before
    assert (requests, len(answer["results"])) == (16, 7)
    assert batches <= 16
    expected = cross_encoder(str(classifiers / "ms-marco")).predict([(QUERY, text) for text in documents])
    best = np.argsort(-expected, kind="stable")[:7]
    np.testing.assert_allclose(
        [row["relevance_score"] for row in answer["results"]], expected[best], atol=TOLERANCE
    )


def test_equal_scores_keep_the_order_of_the_request(serving_classifiers):
    body = {"model": "ms-marco", "query": QUERY, "documents": ["x", "the", "x", "x"]}
    order = [row["index"] for row in post(serving_classifiers, "/v1/rerank", body)["results"]]
    assert [i for i in order if i != 1] == [0, 2, 3]


@pytest.mark.parametrize("kind", ["dense", "sparse", "colbert", "hybrid"])
def test_embedding_models_rerank_by_similarity(serving_classifiers, kind):
    weights = {"dense": 0.4, "sparse": 0.2, "colbert": 0.4} if kind == "hybrid" else {kind: 1}
    body = {"model": "bge-m3", "query": QUERY, "documents": DOCUMENTS, "weights": weights}
    got = scores_of(post(serving_classifiers, "/v1/rerank", body)["results"])
    sides = {"model": "bge-m3", "left": [QUERY], "right": DOCUMENTS, "type": kind}
    expected = post(serving_classifiers, "/v1/embeddings/similarity", sides)["similarity"][0]
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    if kind == "hybrid":
        del body["weights"]
        assert scores_of(post(serving_classifiers, "/v1/rerank", body)["results"]) == pytest.approx(got)


def test_score_pairs(serving_classifiers, classifiers):
    encoder = cross_encoder(str(classifiers / "bge-reranker"))
    pairs = list(zip(DOCUMENTS, reversed(DOCUMENTS), strict=True))
    body = {"model": "bge-reranker", "text_1": DOCUMENTS, "text_2": DOCUMENTS[::-1]}
    got = scores_of(post(serving_classifiers, "/score", body)["data"], "score")
    np.testing.assert_allclose(got, encoder.predict(pairs), atol=TOLERANCE)
    one = {"model": "bge-reranker", "queries": QUERY, "documents": DOCUMENTS}
    got = scores_of(post(serving_classifiers, "/v1/score", one)["data"], "score")
    np.testing.assert_allclose(got, encoder.predict([(QUERY, d) for d in DOCUMENTS]), atol=TOLERANCE)


def test_the_seed_s_own_requests(serving_classifiers):
    request = {"query": "coffee", "documents": ["Starbuck", "Luckin", "Peets Coffee", "One point point"]}
    answer = post(serving_classifiers, "/v1/reranker", request)
    assert {row["document"] for row in answer["results"]} == set(request["documents"])
    assert answer["model"] == "bge-reranker", "the first reranker"
    answer = post(serving_classifiers, "/v1/classifier", {"input": [["what is panda?", "hi"]]})
    assert len(answer["score"]) == 1


def test_a_classifier_is_no_reranker(serving_classifiers):
    body = {"model": "multi-class", "query": "a", "documents": ["b"]}
    for path in ("/v1/reranker", "/v1/rerank", "/rerank", "/v2/rerank"):
        status, answer = serving_classifiers.post(body, path)
        assert status == 400
        assert "multi-class is no reranker: it is a classifier with 3 labels" in json.dumps(answer)


def test_clients_of_other_makers(serving_classifiers, classifiers):
    documents = DOCUMENTS[:4]
    got = ask(
        "rerank_clients", url=serving_classifiers.url, model="bge-reranker", query=QUERY, documents=documents
    )
    scores = cross_encoder(str(classifiers / "bge-reranker")).predict([(QUERY, d) for d in documents])
    best = np.argsort(-scores, kind="stable")[:3].tolist()
    assert got.pop("cohere error") == "documents is an empty list; send at least one text"
    assert len(got) == 10
    # LlamaIndex names no model: it gets the first reranker, whose scores these are, too.
    for name, rows in got.items():
        assert [row[0] for row in rows] == best, f"{name}: {rows}"
        np.testing.assert_allclose([row[1] for row in rows], scores[best], atol=TOLERANCE, err_msg=name)
