"""Dense, sparse and ColBERT through the real server, against the libraries that define them."""

import contextlib
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import numpy as np
import openai
import pytest
import tritonclient.grpc
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder

from tests.server.conftest import LONG
from tests.support.oracle import ask
from tests.support.server import wait_until

TEXTS = [
    "what is the value",
    "a class, an object!",
    "x",
    "this is it; for and of to the query return value class object in a of to",
    "the value of the class is in the object",
]
WEIGHTS = [0.4, 0.2, 0.4]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def flag(kinds):
    """FlagEmbedding's own answers for the same checkpoint."""
    pairs = [[left, right] for left in TEXTS for right in TEXTS]
    path = str(kinds / "bge-m3")
    return ask("flag_embedding", path=path, texts=TEXTS, pairs=pairs, weights=WEIGHTS, max_length=LONG)


def reference(kind, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(str(path), device="cpu", local_files_only=True)


def post(serving, path, body):
    status, answer = serving.post(body, path)
    assert status == 200, answer
    return answer


def embeddings(serving, path, texts=TEXTS, model="bge-m3", **fields):
    answer = post(serving, path, {"model": model, "input": list(texts), **fields})
    assert [item["index"] for item in answer["data"]] == list(range(len(texts)))
    return [item["embedding"] for item in answer["data"]]


def hybrid(serving, texts, outputs, **fields):
    body = {"model": "bge-m3", "input": list(texts), "outputs": outputs, **fields}
    return post(serving, "/v1/embeddings/hybrid", body)["data"]


def test_dense_equals_flag_embedding_and_sentence_transformers(serving_kinds, kinds, flag):
    got = np.array(embeddings(serving_kinds, "/v1/embeddings/dense"))
    np.testing.assert_allclose(got, flag["dense"], atol=TOLERANCE)
    expected = reference(SentenceTransformer, kinds / "bge-m3").encode(TEXTS)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)


def test_sparse_by_id_equals_flag_embedding(serving_kinds, flag):
    got = embeddings(serving_kinds, "/v1/embeddings/sparse", return_decoded=False)
    assert sum(map(len, got)) > 10
    for ours, theirs in zip(got, flag["sparse"], strict=True):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)
        assert set(ours) == set(theirs)


def test_sparse_by_token_is_decoded(serving_kinds, flag):
    got = embeddings(serving_kinds, "/v1/embeddings/sparse")
    ids = sorted({int(token) for row in flag["sparse"] for token in row})
    pieces = [post(serving_kinds, "/decode", {"ids": [[token]]})[0] for token in ids]
    texts = dict(zip(ids, pieces, strict=True))
    for ours, theirs in zip(got, flag["sparse"], strict=True):
        expected = {}
        for token, weight in theirs.items():
            expected[texts[int(token)]] = max(weight, expected.get(texts[int(token)], 0))
        assert ours == pytest.approx(expected, abs=TOLERANCE)
    assert any(key.isalpha() and len(key) > 1 for row in got for key in row), "words, not numbers"


def test_colbert_equals_flag_embedding(serving_kinds, flag):
    got = embeddings(serving_kinds, "/v1/embeddings/colbert")
    for ours, theirs in zip(got, flag["colbert"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=TOLERANCE)


def test_negative_control_other_texts_are_far(serving_kinds, flag):
    got = np.array(embeddings(serving_kinds, "/v1/embeddings/dense"))
    assert np.abs(np.roll(got, 1, axis=0) - flag["dense"]).max() > 0.05
    vectors = embeddings(serving_kinds, "/v1/embeddings/colbert")
    assert np.abs(np.array(vectors[0])[0] - flag["colbert"][1][0]).max() > 0.05


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"type": "dense"}, "dense"),
        ({"embedding_config": {"type": "sparse"}}, "sparse"),
        ({"type": "colbert"}, "colbert"),
        ({"type": "hybrid"}, "colbert+sparse+dense"),
        ({"type": "hybrid", "weights": WEIGHTS}, "colbert+sparse+dense"),
        ({"type": "hybrid", "weights": {"dense": 0.4, "sparse": 0.2}}, "sparse+dense"),
    ],
)
def test_similarity_equals_compute_score(serving_kinds, flag, fields, name):
    body = {"model": "bge-m3", "left": TEXTS, "right": TEXTS, **fields}
    answer = post(serving_kinds, "/v1/embeddings/similarity", body)
    np.testing.assert_allclose(np.ravel(answer["similarity"]), flag["scores"][name], atol=TOLERANCE)
    assert answer["left_response"] is None
    assert answer["right_response"] is None


def test_similarity_gives_the_embeddings_when_asked(serving_kinds):
    body = {"model": "bge-m3", "left": TEXTS[:2], "right": TEXTS[2:], "return_response": True}
    answer = post(serving_kinds, "/v1/embeddings/similarity", body)
    left = [item["embedding"] for item in answer["left_response"]["data"]]
    right = [item["embedding"] for item in answer["right_response"]["data"]]
    np.testing.assert_allclose(np.array(left) @ np.array(right).T, answer["similarity"], atol=TOLERANCE)
    body["type"] = "hybrid"
    answer = post(serving_kinds, "/v1/embeddings/similarity", body)
    assert set(answer["left_response"]) == {"dense", "sparse", "colbert"}


def test_any_subset_in_one_pass(serving_kinds, flag):
    (first, *_) = hybrid(serving_kinds, TEXTS, ["sparse", "colbert"])
    assert set(first) == {"object", "index", "sparse", "colbert"}
    rows = hybrid(serving_kinds, TEXTS, ["dense", "sparse", "colbert"])
    np.testing.assert_allclose([row["dense"] for row in rows], flag["dense"], atol=TOLERANCE)
    for row, sparse, colbert in zip(rows, flag["sparse"], flag["colbert"], strict=True):
        pairs = dict(zip(map(str, row["sparse"]["indices"]), row["sparse"]["values"], strict=True))
        assert pairs == pytest.approx(sparse, abs=TOLERANCE)
        assert row["sparse"]["indices"] == sorted(row["sparse"]["indices"])
        np.testing.assert_allclose(row["colbert"], colbert, atol=TOLERANCE)
    assert rows == hybrid(serving_kinds, TEXTS, None)


def test_top_k_keeps_the_largest_weights(serving_kinds, flag):
    for row, sparse in zip(hybrid(serving_kinds, TEXTS, ["sparse"], top_k=2), flag["sparse"], strict=True):
        largest = sorted(sparse.values(), reverse=True)[:2]
        assert sorted(row["sparse"]["values"], reverse=True) == pytest.approx(largest, abs=TOLERANCE)


def test_embedding_types_with_the_openai_client(serving_kinds, flag):
    with openai.OpenAI(api_key="none", base_url=f"{serving_kinds.url}/v1", max_retries=0) as sdk:
        types = {"embedding_types": ["dense", "sparse"]}
        answer = sdk.embeddings.create(model="bge-m3", input=TEXTS, extra_body=types)
        got = [item.embedding for item in answer.data]
        np.testing.assert_allclose(got, flag["dense"], atol=TOLERANCE)
        assert [len(item.sparse["indices"]) for item in answer.data] == [len(s) for s in flag["sparse"]]
        only = sdk.embeddings.create(model="bge-m3", input=TEXTS, extra_body={"embedding_types": ["sparse"]})
        assert [item.sparse for item in only.data] == [item.sparse for item in answer.data]


def test_base64_of_colbert_has_its_shape(serving_kinds, flag):
    import base64

    (row, *_) = hybrid(serving_kinds, TEXTS[:1], ["colbert"], encoding_format="base64")
    vectors = np.frombuffer(base64.b64decode(row["colbert"]["data"]), "<f4").reshape(row["colbert"]["shape"])
    np.testing.assert_allclose(vectors, flag["colbert"][0], atol=TOLERANCE)


def test_splade_equals_sentence_transformers(serving_kinds, kinds):
    expected = reference(SparseEncoder, kinds / "splade").encode(TEXTS).to_dense().numpy()
    rows = post(serving_kinds, "/embed_sparse", {"model": "splade", "inputs": TEXTS})
    assert (expected > 0).sum(1).min() > 10
    for row, vector in zip(rows, expected, strict=True):
        assert [pair["index"] for pair in row] == vector.nonzero()[0].tolist()
        np.testing.assert_allclose([pair["value"] for pair in row], vector[vector > 0], atol=TOLERANCE)


@pytest.mark.parametrize("model", ["pylate", "stanford"])
@pytest.mark.parametrize("role", ["query", "document"])
def test_colbert_layouts_equal_sentence_transformers(serving_kinds, kinds, model, role):
    encoder = reference(MultiVectorEncoder, kinds / model)
    expected = (encoder.encode_query if role == "query" else encoder.encode_document)(TEXTS)
    fields = {"model": model, "input_type": role, "truncate": True}
    got = embeddings(serving_kinds, "/v1/embeddings/colbert", **fields)
    assert [len(one) for one in got] == [len(one) for one in expected]
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    if role == "document":
        assert got == embeddings(serving_kinds, "/v1/embeddings/colbert", model=model)


def test_similarity_of_a_colbert_model_takes_queries_and_documents(serving_kinds, kinds):
    encoder = reference(MultiVectorEncoder, kinds / "pylate")
    expected = encoder.similarity(encoder.encode_query(TEXTS[:2]), encoder.encode_document(TEXTS))
    body = {"model": "pylate", "left": TEXTS[:2], "right": TEXTS}
    answer = post(serving_kinds, "/v1/embeddings/similarity", body)
    # Ours is the mean over a query's 16 vectors, theirs the sum.
    np.testing.assert_allclose(np.array(answer["similarity"]) * 16, expected, atol=1e-4)


@pytest.mark.parametrize("model", ["mpnet", "modernbert"])
def test_padded_and_windowed_models_equal_sentence_transformers(serving_kinds, kinds, model):
    expected = reference(SentenceTransformer, kinds / model).encode(TEXTS)
    got = embeddings(serving_kinds, "/v1/embeddings", model=model)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    log = serving_kinds.server_log()
    assert ("mpnet.encoder cannot run packed" in log) is True
    assert "modernbert.encoder cannot run packed" not in log


def test_modules_of_the_checkpoint_s_own_equal_sentence_transformers(serving_kinds, kinds):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SentenceTransformer(
            str(kinds / "own"), device="cpu", local_files_only=True, trust_remote_code=True
        )
    got = embeddings(serving_kinds, "/v1/embeddings", model="own")
    np.testing.assert_allclose(got, model.encode(TEXTS), atol=TOLERANCE)


def executions(serving, model="bge-m3"):
    """Stage -> (requests, batches) so far."""
    with tritonclient.grpc.InferenceServerClient(serving.grpc) as client:
        return {
            stage: (stats.inference_count, stats.execution_count)
            for stage in ("tokenizer", "encoder", "dense", "sparse", "colbert", "tokens")
            for stats in client.get_inference_statistics(f"{model}.{stage}").model_stats
        }


def test_a_head_that_nobody_asked_for_is_not_run(serving_kinds):
    before = executions(serving_kinds)
    embeddings(serving_kinds, "/v1/embeddings/sparse")
    after = executions(serving_kinds)
    ran = {stage for stage in after if after[stage] != before[stage]}
    assert ran - {"tokenizer"} == {"encoder", "sparse"}
    assert after["encoder"][1] - before["encoder"][1] == 1
    hybrid(serving_kinds, TEXTS, ["dense", "sparse", "colbert"])
    final = executions(serving_kinds)
    assert {s for s in final if final[s] != after[s]} == {
        "tokenizer",
        "encoder",
        "dense",
        "sparse",
        "colbert",
    }
    assert final["encoder"][1] - after["encoder"][1] == 1, "three heads, one pass"


def counted(serving, name):
    """What the encoder of bge-m3 has counted."""
    return serving.scrape()[f"triton_embeddings_encoder_{name}", ("model", "bge-m3")]


def test_sixty_requests_of_three_kinds_share_the_encoder(serving_kinds, flag):
    kinds = ("dense", "sparse", "colbert")
    before = {name: counted(serving_kinds, name) for name in ("turns_total", "pass_tokens_sum")}

    def client(number):
        kind = kinds[number % 3]
        text = number % len(TEXTS)
        body = {"model": "bge-m3", "input": [TEXTS[text]]}
        if kind == "sparse":
            body["return_decoded"] = False
        answer = post(serving_kinds, f"/v1/embeddings/{kind}", body)
        return kind, text, answer["data"][0]["embedding"], answer["usage"]["prompt_tokens"]

    def long(number):
        body = {"model": "bge-m3", "input": "the value of it " * 1500}
        return post(serving_kinds, "/v1/embeddings/dense", body)["usage"]["prompt_tokens"]

    # Something long first, so that the sixty wait together behind it.
    with ThreadPoolExecutor(64) as pool:
        longs = pool.map(long, range(4))
        answers = list(pool.map(client, range(60)))
        tokens = sum(longs) + sum(count for *_, count in answers)
    for kind, text, got, _ in answers:
        if kind == "sparse":
            assert got == pytest.approx(flag["sparse"][text], abs=TOLERANCE)
        else:
            np.testing.assert_allclose(got, flag[kind][text], atol=TOLERANCE)
    wait_until(
        lambda: counted(serving_kinds, "pass_tokens_sum") - before["pass_tokens_sum"] >= tokens,
        "the encoder to tell of all tokens",
    )
    turns = counted(serving_kinds, "turns_total") - before["turns_total"]
    assert turns <= 30, f"{turns} turns for 64 requests"


def test_texts_of_3_and_of_8192_tokens_in_one_batch(serving_kinds, kinds, flag):
    long = "the value of it " * (LONG // 4)
    ids = post(serving_kinds, "/tokenize", {"model": "bge-m3", "inputs": [long]})[0]
    assert len(ids) > LONG
    texts = [TEXTS[2], long, TEXTS[0], TEXTS[2]]
    rows = hybrid(serving_kinds, texts, ["dense", "sparse", "colbert"], truncate=True)
    assert [row.get("truncated", False) for row in rows] == [False, True, False, False]
    for row, place in ((rows[0], 2), (rows[2], 0), (rows[3], 2)):
        np.testing.assert_allclose(row["dense"], flag["dense"][place], atol=TOLERANCE)
        np.testing.assert_allclose(row["colbert"], flag["colbert"][place], atol=TOLERANCE)
        pairs = dict(zip(map(str, row["sparse"]["indices"]), row["sparse"]["values"], strict=True))
        assert pairs == pytest.approx(flag["sparse"][place], abs=TOLERANCE)
    assert np.shape(rows[1]["colbert"]) == (LONG - 1, 32)
    expected = reference(SentenceTransformer, kinds / "bge-m3").encode([long])
    np.testing.assert_allclose(rows[1]["dense"], expected[0], atol=TOLERANCE)


def test_memory_stays_bounded_with_long_documents(serving_kinds):
    """Scores of 8192 by 8192 tokens in four heads would be 1 GB, of one document."""

    def peaks():
        """MB that each process of the model had at most."""
        sizes = []
        for pid, command in serving_kinds.descendants().items():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if "bge-m3" in command:
                    status = (Path("/proc") / str(pid) / "status").read_text()
                    sizes.append(int(status.split("VmHWM:")[1].split()[0]) // 1024)
        return sizes

    long = ["the value of it " * (LONG // 4)] * 8
    outputs = ["dense", "sparse", "colbert"]
    rows = hybrid(serving_kinds, long, outputs, truncate=True, encoding_format="base64")
    assert [row["colbert"]["shape"] for row in rows] == [[LONG - 1, 32]] * 8
    assert len(peaks()) >= 5
    assert max(peaks()) < 800


def test_the_server_s_own_client_gets_packed_tensors(serving_kinds, flag):
    with tritonclient.grpc.InferenceServerClient(serving_kinds.grpc) as client:
        text = tritonclient.grpc.InferInput("text", [len(TEXTS), 1], "BYTES")
        text.set_data_from_numpy(np.array([[t.encode()] for t in TEXTS], object))
        result = client.infer("bge-m3", [text])
    counts = result.as_numpy("vector_count").ravel()
    assert counts.tolist() == [len(vectors) for vectors in flag["colbert"]]
    assert result.as_numpy("token_vectors").shape == (1, counts.sum(), 32)
    np.testing.assert_allclose(
        result.as_numpy("token_vectors")[0], np.concatenate(flag["colbert"]), atol=TOLERANCE
    )
    assert result.as_numpy("sparse_count").ravel().tolist() == [len(s) for s in flag["sparse"]]
    assert result.as_numpy("sparse_indices").dtype == np.int32
    assert result.as_numpy("sparse_weights").shape == (1, sum(len(s) for s in flag["sparse"]))
    assert result.as_numpy("token_ids").shape[1] == result.as_numpy("n_tokens").sum()
    assert result.as_numpy("token_embeddings").shape == (1, result.as_numpy("n_tokens").sum(), 32)


def test_a_model_is_asked_for_what_it_cannot_give(serving_kinds):
    for path, model, offer in (
        ("/v1/embeddings/sparse", "mpnet", "it serves embed"),
        ("/v1/embeddings/dense", "splade", "it serves sparse"),
        ("/v1/embeddings", "pylate", "it serves colbert"),
        ("/v1/embeddings/hybrid", "splade", "it serves sparse"),
    ):
        body = {"model": model, "input": "a", "outputs": ["dense"]}
        status, answer = serving_kinds.post(body, path)
        assert status == 400
        assert f"the model {model} does not serve" in json.dumps(answer)
        assert offer in json.dumps(answer)


def test_the_hub_s_client(serving_kinds, kinds):
    expected = reference(SentenceTransformer, kinds / "bge-m3").encode(TEXTS)
    for url in (serving_kinds.url, f"{serving_kinds.url}/embed"):
        client = huggingface_hub.InferenceClient(url)
        np.testing.assert_allclose(client.feature_extraction(TEXTS[0])[0], expected[0], atol=TOLERANCE)
        got = client.feature_extraction(TEXTS, normalize=True, truncate=True)
        np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    scores = huggingface_hub.InferenceClient(serving_kinds.url).sentence_similarity(TEXTS[0], TEXTS[1:])
    np.testing.assert_allclose(scores, expected[1:] @ expected[0], atol=TOLERANCE)


def test_llama_index_s_client(serving_kinds, kinds):
    expected = reference(SentenceTransformer, kinds / "bge-m3").encode(TEXTS)
    got = ask("tei_client", url=serving_kinds.url, model="bge-m3", texts=TEXTS)
    np.testing.assert_allclose(got["texts"], expected, atol=TOLERANCE)
    np.testing.assert_allclose(got["query"], expected[0], atol=TOLERANCE)
    assert got["query_async"] == got["query"]


def test_every_token_s_vector(serving_kinds, kinds):
    model = reference(SentenceTransformer, kinds / "bge-m3")
    expected = model.encode(TEXTS, output_value="token_embeddings")
    got = post(serving_kinds, "/embed_all", {"model": "bge-m3", "inputs": TEXTS})
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_seed_s_own_requests(serving_kinds):
    request = {"input": ["text_input"]}
    for endpoint in ("/v1/embeddings/dense", "/v1/embeddings/sparse", "/v1/embeddings/colbert"):
        answer = post(serving_kinds, endpoint, request)
        assert answer["model"] == "bge-m3"
        assert answer["usage"]["total_tokens"] > 2
