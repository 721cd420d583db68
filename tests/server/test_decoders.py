"""Decoder models through the real server, against the libraries and the model cards that define them."""

import concurrent.futures
import json
import warnings
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
import tritonclient.grpc
from sentence_transformers import CrossEncoder, SentenceTransformer

from backends.device import compute_dtype
from tests.support import checkpoints, decoders
from tests.support.card_rerankers import model_card, mxbai_rerank
from tests.support.oracle import ask
from tests.support.server import serve
from triton_embeddings import models

TEXTS = ["the value of this class", "x", "return it; for and of to the query: value (Äß 12)"]
QUERY = "what is the value?"
DOCUMENTS = ["A class of it", "x", "this is it; for {and} of to the query return value\n", "Äß \n 12", "x"]
PAIRS = [(QUERY, document) for document in DOCUMENTS]
TASK = "Retrieve the value"
TOLERANCE = 1e-5
EMBEDDERS = {
    # What is passed to transformers' tokenizer so that it gives the last token, causality, what an
    # instruction stands in.
    "e5-mistral": ({"add_eos_token": True, "add_bos_token": True}, None, "Instruct: {}\nQuery: "),
    "gte-qwen2": ({"add_eos_token": True}, False, "Instruct: {}\nQuery: "),
    "gte-qwen2-causal": ({"add_eos_token": True}, True, "Instruct: {}\nQuery: "),
    "qwen3-embedding": ({}, None, "Instruct: {}\nQuery:"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint in each published layout."""
    made = tmp_path_factory.mktemp("decoders")
    decoders.e5_mistral(made / "e5-mistral")
    decoders.gte_qwen2(made / "gte-qwen2")
    decoders.qwen3_embedding(made / "qwen3-embedding")
    decoders.qwen3_reranker(made / "qwen3-reranker")
    decoders.converted(made / "qwen3-seq-cls", made / "qwen3-reranker", ("no", "yes"))
    decoders.bge_gemma(made / "bge-reranker-v2-gemma")
    decoders.mxbai_v2(made / "mxbai-rerank-v2")
    checkpoints.classifier(made / "classifier", checkpoints.qwen2, 3, ("good", "bad", "ugly"))
    return made


@pytest.fixture(scope="module")
def serving(tmp_path_factory, folder):
    """All of them in float32; one reranker a second time, without shared prefixes."""
    place = tmp_path_factory.mktemp("serving-decoders")
    options = {
        "e5-mistral": {},
        "gte-qwen2": {"task": "embed", "model_type": "qwen_2_embedding"},
        "gte-qwen2-causal": {"task": "DENSE_EMBEDDING", "causal": True},
        "qwen3-embedding": {"task": "embed"},
        "qwen3-reranker": {"max_batch_tokens": 2048},
        "qwen3-plain": {"share_prefix": False},
        "qwen3-seq-cls": {},
        "bge-reranker-v2-gemma": {},
        "mxbai-rerank-v2": {},
        "classifier": {},
    }
    sources = {"gte-qwen2-causal": "gte-qwen2", "qwen3-plain": "qwen3-reranker"}
    for name, given in options.items():
        path = folder / sources.get(name, name)
        models.add(place / "models", str(path), name, {"dtype": "float32", **given})
    with serve(
        place / "output", "--model-repository", place / "models", GATEWAY_CANARY_INTERVAL_S="60"
    ) as running:
        yield running


def reference(folder, name):
    processor, is_causal, _ = EMBEDDERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SentenceTransformer(
            str(folder / name.removesuffix("-causal")),
            device="cpu",
            local_files_only=True,
            processor_kwargs=processor,
        )
    if is_causal is not None:
        model[0].model.config.is_causal = is_causal
    return model


def post(serving, path, body):
    status, answer = serving.post(body, path)
    assert status == 200, answer
    return answer


def embeddings(serving, model, path="/v1/embeddings", **fields):
    answer = post(serving, path, {"model": model, "input": TEXTS, **fields})
    return np.array([row["embedding"] for row in answer["data"]])


@pytest.mark.parametrize("model", EMBEDDERS)
def test_embeddings_equal_sentence_transformers(serving, folder, model):
    library = reference(folder, model)
    bare = library.encode(TEXTS)
    np.testing.assert_allclose(embeddings(serving, model), bare, atol=TOLERANCE)
    for fields in ({"input_type": "document"}, {"input_type": "passage"}, {"prompt_name": "document"}):
        np.testing.assert_allclose(embeddings(serving, model, **fields), bare, atol=TOLERANCE)
    name = "query" if library.prompts.get("query") else "web_search_query"
    query = library.encode(TEXTS, prompt_name=name)
    for fields in ({"input_type": "query"}, {"input_type": "search_query"}, {"prompt_name": "query"}):
        np.testing.assert_allclose(embeddings(serving, model, **fields), query, atol=TOLERANCE)
    assert np.abs(query - bare).max() > 0.01, "negative control: an instruction shows"


@pytest.mark.parametrize("model", EMBEDDERS)
def test_an_instruction_on_every_route(serving, folder, model):
    template = EMBEDDERS[model][2]
    library = reference(folder, model)
    expected = library.encode(TEXTS, prompt=template.format(TASK))
    for path in ("/v1/embeddings", "/v1/embeddings/dense"):
        np.testing.assert_allclose(
            embeddings(serving, model, path, instruction=TASK), expected, atol=TOLERANCE
        )
    hybrid = post(serving, "/v1/embeddings/hybrid", {"model": model, "input": TEXTS, "instruction": TASK})
    np.testing.assert_allclose([row["dense"] for row in hybrid["data"]], expected, atol=TOLERANCE)
    tei = post(serving, "/embed", {"model": model, "inputs": TEXTS, "instruction": TASK})
    np.testing.assert_allclose(tei, expected, atol=TOLERANCE)
    left = library.encode(TEXTS[:1], prompt=template.format(TASK))
    body = {"model": model, "left": TEXTS[:1], "right": TEXTS, "instruction": TASK}
    similarity = post(serving, "/v1/embeddings/similarity", body)["similarity"]
    np.testing.assert_allclose(similarity, left @ library.encode(TEXTS).T, atol=TOLERANCE)
    other = template[:-1] if template.endswith(" ") else template + " "
    wrong = library.encode(TEXTS, prompt=other.format(TASK))
    assert np.abs(wrong - expected).max() > 0.01, "negative control: a blank shows"


def test_negative_controls_of_the_last_token_and_of_causality(serving, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bare = SentenceTransformer(str(folder / "e5-mistral"), device="cpu", local_files_only=True)
    assert np.abs(bare.encode(TEXTS) - embeddings(serving, "e5-mistral")).max() > 0.01
    difference = embeddings(serving, "gte-qwen2") - embeddings(serving, "gte-qwen2-causal")
    assert np.abs(difference).max() > 0.01


def test_dimensions_are_cut_before_unit_length(serving, folder):
    expected = reference(folder, "qwen3-embedding").encode(TEXTS, truncate_dim=12, normalize_embeddings=True)
    got = embeddings(serving, "qwen3-embedding", dimensions=12)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


def test_the_openai_client(serving, folder):
    client = openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none")
    answer = client.embeddings.create(
        model="qwen3-embedding", input=TEXTS, extra_body={"instruction": TASK}, dimensions=8
    )
    expected = reference(folder, "qwen3-embedding").encode(
        TEXTS, prompt=f"Instruct: {TASK}\nQuery:", truncate_dim=8, normalize_embeddings=True
    )
    np.testing.assert_allclose([row.embedding for row in answer.data], expected, atol=TOLERANCE)


def test_the_server_s_own_client(serving, folder):
    with tritonclient.grpc.InferenceServerClient(serving.grpc) as client:
        text = tritonclient.grpc.InferInput("text", [len(TEXTS), 1], "BYTES")
        text.set_data_from_numpy(np.array([[t.encode()] for t in TEXTS], object))
        result = client.infer("gte-qwen2", [text], parameters={"instruction": TASK})
        pairs = tritonclient.grpc.InferInput("text", [len(PAIRS), 2], "BYTES")
        pairs.set_data_from_numpy(np.array([[a.encode(), b.encode()] for a, b in PAIRS], object))
        logits = client.infer("qwen3-reranker", [pairs], parameters={"instruction": TASK}).as_numpy("logits")
    expected = reference(folder, "gte-qwen2").encode(TEXTS, prompt=f"Instruct: {TASK}\nQuery: ")
    np.testing.assert_allclose(result.as_numpy("dense"), expected, atol=TOLERANCE)
    card = model_card(folder / "qwen3-reranker", PAIRS, TASK)
    np.testing.assert_allclose(1 / (1 + np.exp(-logits[:, 0])), card, atol=TOLERANCE)


def scores(serving, path, model, documents=DOCUMENTS, **fields):
    body = {"model": model, "query": QUERY, "documents": documents, **fields}
    rows = post(serving, path, body)
    rows = rows if isinstance(rows, list) else rows["results"]
    ordered = sorted(rows, key=lambda row: row["index"])
    return np.array([row.get("relevance_score", row.get("score")) for row in ordered])


@pytest.mark.parametrize("model", ["qwen3-reranker", "qwen3-plain", "qwen3-seq-cls"])
def test_qwen3_reranker_equals_the_model_card(serving, folder, model):
    expected = model_card(folder / "qwen3-reranker", PAIRS)
    for path in ("/v1/rerank", "/v2/rerank", "/v1/reranker", "/infinity/rerank"):
        np.testing.assert_allclose(scores(serving, path, model), expected, atol=TOLERANCE, err_msg=path)
    raw = scores(serving, "/v1/reranker", model, normalize=False)
    np.testing.assert_allclose(1 / (1 + np.exp(-raw)), expected, atol=TOLERANCE)
    instructed = model_card(folder / "qwen3-reranker", PAIRS, TASK)
    for name in ("instruction", "instruct"):
        got = scores(serving, "/v1/rerank", model, **{name: TASK})
        np.testing.assert_allclose(got, instructed, atol=TOLERANCE)
    body = {"model": model, "text_1": QUERY, "text_2": DOCUMENTS, "instruction": TASK}
    got = [row["score"] for row in post(serving, "/v1/score", body)["data"]]
    np.testing.assert_allclose(got, instructed, atol=TOLERANCE)
    assert np.abs(instructed - expected).max() > 1e-3, "negative control: the instruction shows"
    less = model_card(folder / "qwen3-reranker", PAIRS, newlines=1)
    assert np.abs(less - expected).max() > 1e-3, "negative control: a newline shows"


def test_the_conversion_equals_the_cross_encoder(serving, folder, tmp_path):
    path = decoders.without_chat_template(folder / "qwen3-seq-cls", tmp_path / "c")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = CrossEncoder(str(path), device="cpu", local_files_only=True)
        expected = encoder.predict(decoders.formatted_pairs(PAIRS), activation_fn=torch.nn.Sigmoid())
    np.testing.assert_allclose(scores(serving, "/v1/rerank", "qwen3-seq-cls"), expected, atol=TOLERANCE)


def test_bge_gemma_equals_flag_llm_reranker(serving, folder):
    path = folder / "bge-reranker-v2-gemma"
    documents = ["a class of it", "this is it", "x " * 30]
    pairs = [(QUERY, document) for document in documents]
    expected = np.array(ask("flag_llm_reranker", path=str(path), pairs=pairs, max_length=128))
    raw = scores(serving, "/v1/reranker", "bge-reranker-v2-gemma", documents)
    np.testing.assert_allclose(raw, expected, atol=TOLERANCE)
    unit = scores(serving, "/v1/rerank", "bge-reranker-v2-gemma", documents)
    np.testing.assert_allclose(unit, 1 / (1 + np.exp(-expected)), atol=TOLERANCE)


def test_mxbai_equals_its_makers_computation(serving, folder):
    expected = mxbai_rerank(folder / "mxbai-rerank-v2", PAIRS)
    raw = scores(serving, "/v1/reranker", "mxbai-rerank-v2")
    np.testing.assert_allclose(raw, expected, atol=TOLERANCE)
    instructed = scores(serving, "/v1/reranker", "mxbai-rerank-v2", instruction=TASK)
    expected = mxbai_rerank(folder / "mxbai-rerank-v2", PAIRS, TASK)
    np.testing.assert_allclose(instructed, expected, atol=TOLERANCE)


def test_a_classifier_on_a_decoder(serving, folder):
    from transformers import pipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classify = pipeline("text-classification", model=str(folder / "classifier"), device="cpu")
    expected = [classify(text, top_k=None) for text in TEXTS]
    got = post(serving, "/v1/classify", {"model": "classifier", "input": TEXTS})["data"]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours["label"] == theirs[0]["label"]
        assert max(ours["probs"]) == pytest.approx(theirs[0]["score"], abs=TOLERANCE)


def test_shared_prefixes_change_nothing_across_clients(serving):
    """Queries of several clients in one batch, each with its documents, against the model that shares
    nothing.
    """
    queries = [f"{QUERY} {i}" for i in range(6)]
    documents = [f"{text} {i}" for i in range(20) for text in DOCUMENTS]

    def ranked(model, query):
        body = {"model": model, "query": query, "documents": documents, "sorted": False}
        return [row["relevance_score"] for row in post(serving, "/v1/rerank", body)["results"]]

    expected = [ranked("qwen3-plain", query) for query in queries]
    with concurrent.futures.ThreadPoolExecutor(len(queries)) as pool:
        got = list(pool.map(lambda query: ranked("qwen3-reranker", query), queries))
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    assert np.std(expected) > 1e-3
    log = serving.server_log()
    assert "qwen3-reranker.encoder: INFO qwen3 on cpu in float32, packed, shared prefixes once" in log
    assert "qwen3-plain.encoder: INFO qwen3 on cpu in float32, packed, " in log
    assert log.count("shared prefixes once") == 8, "of ten models one looks both ways, and one is told not to"


def test_the_log_says_what_looks_both_ways(serving):
    log = serving.server_log()
    assert "gte-qwen2.encoder: INFO bidirectional: --model-type qwen_2_embedding" in log
    assert "gte-qwen2-causal.encoder: INFO causal: --causal" in log


def test_long_pairs_are_cut_and_say_so(serving, folder):
    pairs = [(QUERY, "a class of " * 300)]
    body = {"model": "qwen3-reranker", "query": QUERY, "documents": [pairs[0][1], "x"]}
    (cut,) = [row for row in post(serving, "/v1/rerank", body)["results"] if row["index"] == 0]
    assert cut["truncated"] is True
    expected = model_card(folder / "qwen3-reranker", pairs)
    assert cut["relevance_score"] == pytest.approx(expected[0], abs=TOLERANCE)
    status, refused = serving.post({**body, "truncation": False}, "/v1/rerank")
    assert status == 400
    assert "with the prompt around it, and this model takes 512 tokens" in refused["message"]


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        (
            "/v1/embeddings",
            {"model": "e5-mistral", "input": "a", "instruction": "b", "input_type": "document"},
            "an instruction is for queries",
        ),
        (
            "/v1/embeddings",
            {"model": "e5-mistral", "input": "a", "instruction": "b", "prompt": "c"},
            "instruction and prompt both say",
        ),
        (
            "/v1/classifier",
            {"model": "qwen3-embedding", "input": ["a"]},
            "does not serve classify",
        ),
        ("/v1/embeddings", {"model": "qwen3-reranker", "input": "a"}, "does not serve embed"),
    ],
)
def test_what_is_refused(serving, path, body, text):
    status, answer = serving.post(body, path)
    assert status == 400
    assert text in json.dumps(answer)


def test_the_shapes_of_qwen3_embedding_stay_within_two_gigabytes(tmp_path, record_property):
    # Where bfloat16 is not in the hardware a token takes a tenth of a second in all the layers.
    is_slow = compute_dtype("auto", torch.device("cpu")) is torch.float32
    layers = 4 if is_slow else 28
    # A layer has 15.7 million weights.
    limit = 2 * 2**20 - (28 - layers) * 15.7e6 * 2 / 2**10
    models.add(
        tmp_path / "models",
        str(decoders.qwen3_embedding_shapes(tmp_path / "c", layers)),
        "qwen3-0.6b",
        {"dtype": "bfloat16", "task": "embed"},
    )
    with serve(tmp_path / "output", "--model-repository", tmp_path / "models") as running:
        lengths = (3, 120, 10, 10, 30, 1) if is_slow else (3, 900, 40, 40, 200, 1)
        texts = [f"{i} " + "the value " * n for i, n in enumerate(lengths)]
        answer = post(running, "/v1/embeddings", {"input": texts, "input_type": "query"})
        got = np.array([row["embedding"] for row in answer["data"]])
        assert got.shape == (6, 1024)
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-3)
        assert answer["usage"]["total_tokens"] > 2 * sum(lengths)
        np.testing.assert_array_less(1e-3, np.abs(got[1:] - got[:-1]).max(1))
        (pid,) = [pid for pid, line in running.descendants().items() if "0.6b.encoder" in line]
        status = Path(f"/proc/{pid}/status").read_text()
        (peak,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
        assert peak < limit, f"{peak / 2**20:.2f} GB"
        record_property("the encoder's process, GB", round(peak / 2**20, 2))
