"""Heads inside the encoder, through the real server: the same answers as with a process for each head."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc

from tests.support.server import NO_PINGS, serve
from triton_embeddings import models

TEXTS = [
    "what is the value",
    "x",
    "this is it; for and of to the query return value class object in a of to",
    "the value of the class is in the object",
]
OUTPUTS = (
    "dense",
    "sparse_indices",
    "sparse_weights",
    "sparse_count",
    "token_vectors",
    "vector_count",
    "n_tokens",
    "truncated",
)
# Mostly they are equal bit by bit. A pass on one core and one on two add up in another order, whichever
# pipeline it is: of raw vectors 12 long one and the same encoder's components differ by up to 2e-6.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def serving(tmp_path_factory, classifiers, kinds):
    """An embedding model and a classifier, each with fused heads and without."""
    folder = tmp_path_factory.mktemp("serving-fused")
    for path in (kinds / "bge-m3", classifiers / "multi-class"):
        models.add(folder / "models", str(path), path.name, {"dtype": "float32"})
        fused = {"dtype": "float32", "fuse_heads": True}
        models.add(folder / "models", str(path), f"{path.name}-fused", fused)
    with serve(
        folder / "output", "--model-repository", folder / "models", GATEWAY_CANARY_INTERVAL_S="60", **NO_PINGS
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(serving):
    with tritonclient.grpc.InferenceServerClient(serving.grpc) as made:
        yield made


def ask(client, model, outputs, texts=TEXTS, **parameters):
    """Output -> array."""
    text = tritonclient.grpc.InferInput("text", [len(texts), 1], "BYTES")
    text.set_data_from_numpy(np.array([[t.encode()] for t in texts], object))
    wanted = [tritonclient.grpc.InferRequestedOutput(name) for name in outputs]
    result = client.infer(model, [text], outputs=wanted, parameters=parameters)
    return {name: result.as_numpy(name) for name in outputs}


@pytest.mark.parametrize("parameters", [{}, {"dimensions": 8, "top_k": 2}, {"normalize": False}])
def test_the_same_vectors_as_from_heads_in_processes_of_their_own(client, parameters):
    got = ask(client, "bge-m3-fused", OUTPUTS, **parameters)
    expected = ask(client, "bge-m3", OUTPUTS, **parameters)
    for name in OUTPUTS:
        size = max(1, np.abs(expected[name]).max())
        np.testing.assert_allclose(got[name], expected[name], atol=TOLERANCE * size, err_msg=name)
    assert got["dense"].shape == (len(TEXTS), parameters.get("dimensions", 32))
    if "top_k" in parameters:
        assert got["sparse_count"].max() == 2
    if "normalize" in parameters:
        assert np.abs(np.linalg.norm(got["dense"], axis=1) - 1).min() > 0.01
    other = ask(client, "bge-m3-fused", ["dense"], [*TEXTS[1:], TEXTS[0]], **parameters)
    assert np.abs(other["dense"] - expected["dense"]).max() > 0.05, "else this shows nothing"


def test_some_of_the_outputs(client):
    whole = ask(client, "bge-m3-fused", OUTPUTS)
    for outputs in (("dense",), ("sparse_indices", "sparse_weights"), ("token_vectors", "n_tokens")):
        for name, values in ask(client, "bge-m3-fused", outputs).items():
            np.testing.assert_allclose(values, whole[name], atol=TOLERANCE)


def test_a_classifier_has_the_same_logits(client):
    got = ask(client, "multi-class-fused", ["logits"])["logits"]
    np.testing.assert_allclose(got, ask(client, "multi-class", ["logits"])["logits"], atol=TOLERANCE)
    assert got.shape == (len(TEXTS), 3)
    assert np.std(got, axis=0).min() > 0.001, "the texts must differ"


def test_a_wrong_dimension_is_refused_alone(client):
    expected = ask(client, "bge-m3", ["dense"])["dense"]

    def one(number):
        if number % 5:
            return ask(client, "bge-m3-fused", ["dense"])["dense"]
        with pytest.raises(tritonclient.grpc.InferenceServerException) as caught:
            ask(client, "bge-m3-fused", ["dense"], dimensions=99)
        return caught.value

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(one, range(20)))
    for number, answer in enumerate(found):
        if number % 5:
            np.testing.assert_allclose(answer, expected, atol=1e-5)
        else:
            assert answer.status() == "StatusCode.INVALID_ARGUMENT"
            assert answer.message().endswith("invalid_dimensions: dimensions is 99; this model takes 1 to 32")


def test_there_are_no_processes_of_heads(client):
    entries = {model.name for model in client.get_model_repository_index().models}
    fused = {name for name in entries if "-fused" in name}
    assert fused == {
        f"{model}{stage}"
        for model in ("bge-m3-fused", "multi-class-fused")
        for stage in ("", ".tokenizer", ".encoder")
    }
    assert "bge-m3.dense" in entries
    text = tritonclient.grpc.InferInput("text", [1, 1], "BYTES")
    text.set_data_from_numpy(np.array([[b"x"]], object))
    before = _executions(client)
    client.infer("bge-m3-fused", [text])
    assert _executions(client) == before, "the other pipeline's entries do not help"


def _executions(client):
    stages = ("tokenizer", "encoder", "dense", "sparse", "colbert")
    found = (client.get_inference_statistics(f"bge-m3.{stage}").model_stats for stage in stages)
    return [stats.inference_count for one in found for stats in one]


def test_through_the_gateway(serving):
    body = {"input": TEXTS, "outputs": ["dense", "sparse", "colbert"]}
    rows = {}
    for model in ("bge-m3", "bge-m3-fused"):
        status, rows[model] = serving.post({"model": model, **body}, "/v1/embeddings/hybrid")
        assert status == 200, rows[model]
    for ours, theirs in zip(rows["bge-m3-fused"]["data"], rows["bge-m3"]["data"], strict=True):
        np.testing.assert_allclose(ours["dense"], theirs["dense"], atol=1e-5)
        np.testing.assert_allclose(ours["colbert"], theirs["colbert"], atol=1e-5)
        assert ours["sparse"]["indices"] == theirs["sparse"]["indices"]
    status, answer = serving.post({"model": "bge-m3-fused", "inputs": "x"}, "/embed_all")
    assert status == 400
    assert "the model bge-m3-fused does not serve" in json.dumps(answer)
