"""Real embeddings through the real server and the real gateway, with the clients that people use."""

import asyncio
import base64
import json
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import tritonclient.grpc
import tritonclient.http
from sentence_transformers import SentenceTransformer

from tests.server.conftest import HALVES
from tests.support.pipeline import cosine
from tests.support.sentences import sentences

TEXTS = list(sentences(200))


@pytest.fixture(scope="session")
def expected(reference):
    return reference.encode(TEXTS)


def vectors(answer):
    return np.array([item["embedding"] for item in answer["data"]], np.float32)


def embed(serving, texts, model="minilm-float32", **fields):
    status, answer = serving.post({"model": model, "input": texts, "truncate": True, **fields})
    assert status == 200, answer
    return vectors(answer)


@pytest.fixture
def sdk(serving):
    with openai.OpenAI(api_key="none", base_url=f"{serving.url}/v1", max_retries=0) as client:
        yield client


def test_the_texts_are_of_mixed_length(reference):
    lengths = [len(ids) for ids in reference.tokenizer(TEXTS)["input_ids"]]
    assert min(lengths) <= 4
    assert max(lengths) > 150
    assert len(set(lengths)) > 60


@pytest.mark.parametrize(("model", "least"), [("minilm-float32", 0.9999), ("all-MiniLM-L6-v2", 0.999)])
@pytest.mark.parametrize("encoding", [openai.NOT_GIVEN, "float"])
def test_two_hundred_sentences_equal_sentence_transformers(sdk, expected, model, least, encoding):
    answer = sdk.embeddings.create(
        model=model, input=TEXTS, encoding_format=encoding, extra_body={"truncate": True}
    )
    got = np.array([item.embedding for item in answer.data])
    assert [item.index for item in answer.data] == list(range(200))
    assert cosine(got, expected).min() >= least
    if model == "minilm-float32":
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_negative_control_other_texts_are_far_away(serving, expected):
    got = embed(serving, TEXTS)
    assert np.abs(cosine(np.roll(got, 1, axis=0), expected)).mean() < 0.8
    assert cosine(np.roll(got, 1, axis=0), expected).min() < 0.2


async def test_the_asynchronous_client(serving, expected):
    async with openai.AsyncOpenAI(api_key="none", base_url=f"{serving.url}/v1", max_retries=0) as sdk:
        answers = await asyncio.gather(
            *(sdk.embeddings.create(model="minilm-float32", input=TEXTS[i : i + 5]) for i in range(0, 50, 5))
        )
    got = np.array([item.embedding for answer in answers for item in answer.data])
    np.testing.assert_allclose(got, expected[:50], atol=1e-5)


def test_usage_counts_the_real_tokens(serving, reference):
    _, answer = serving.post({"model": "minilm-float32", "input": TEXTS[:9], "truncate": True})
    real = sum(
        len(ids) for ids in reference.tokenizer(TEXTS[:9], truncation=True, max_length=256)["input_ids"]
    )
    assert answer["usage"] == {"prompt_tokens": real, "total_tokens": real}


def test_base64_and_float_are_the_same_numbers(serving):
    _, floats = serving.post({"input": TEXTS[:3], "model": "minilm-float32"})
    _, coded = serving.post({"input": TEXTS[:3], "model": "minilm-float32", "encoding_format": "base64"})
    decoded = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in coded["data"]]
    np.testing.assert_allclose(decoded, vectors(floats), atol=2e-6)


def test_packed_together_equals_one_by_one(serving):
    # max_batch_tokens is 512 for this model: the list runs in many packed passes, each text alone in one.
    together = embed(serving, TEXTS[:40])
    alone = np.concatenate([embed(serving, text) for text in TEXTS[:40]])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_list_over_the_batch_size_comes_back_in_order(serving, expected):
    rows = [i * 7 % 200 for i in range(700)]
    got = embed(serving, [TEXTS[i] for i in rows])
    np.testing.assert_allclose(got, expected[rows], atol=1e-5)


def test_sixty_four_clients_at_once_each_get_their_own_answer(serving, expected):
    def client(number):
        own = [(number * 13 + i * 29) % 200 for i in range(1 + number % 5)]
        return own, embed(serving, [TEXTS[i] for i in own])

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(client, range(64)))
    # That they share the encoder's turns is told in test_kinds.py.
    for own, got in answers:
        np.testing.assert_allclose(got, expected[own], atol=1e-5)


@pytest.mark.parametrize("module", [tritonclient.grpc, tritonclient.http])
def test_the_server_s_own_clients(serving, expected, module):
    client = module.InferenceServerClient(serving.grpc if module is tritonclient.grpc else serving.http)
    text = module.InferInput("text", [5, 1], "BYTES")
    text.set_data_from_numpy(np.array([[t.encode()] for t in TEXTS[:5]], object))
    outputs = [module.InferRequestedOutput(name) for name in ("dense", "n_tokens")]
    result = client.infer("minilm-float32", [text], outputs=outputs, parameters={"truncation": "right"})
    np.testing.assert_allclose(result.as_numpy("dense"), expected[:5], atol=1e-5)
    assert result.as_numpy("n_tokens").shape == (5, 1)
    whole = client.infer("minilm-float32", [text], parameters={"truncation": "right", "dimensions": 16})
    assert whole.as_numpy("dense").shape == (5, 16)
    assert whole.as_numpy("truncated").tolist() == [[False]] * 5
    client.close()


def test_dimensions_cut_and_renormalise(serving, sdk, expected):
    answer = sdk.embeddings.create(model="minilm-float32", input=TEXTS[:5], dimensions=64)
    got = np.array([item.embedding for item in answer.data])
    short = expected[:5, :64]
    np.testing.assert_allclose(got, short / np.linalg.norm(short, axis=1, keepdims=True), atol=1e-5)
    raw = embed(serving, TEXTS[:5], normalize=False)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.01
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), expected[:5], atol=1e-5)


def test_prompts_pooling_and_dense_of_a_checkpoint(serving, tiny):
    texts = ["what is the value", "a class", "x"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SentenceTransformer(str(tiny), device="cpu", local_files_only=True)
        plain, named = model.encode(texts), model.encode(texts, prompt_name="query")
    np.testing.assert_allclose(embed(serving, texts, "org/tiny"), plain, atol=1e-5)
    np.testing.assert_allclose(embed(serving, texts, "org/tiny", prompt_name="query"), named, atol=1e-5)
    np.testing.assert_allclose(embed(serving, texts, "org/tiny", prompt="query: "), named, atol=1e-5)
    assert np.abs(plain - named).max() > 0.01


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_on_the_way_to_the_heads(serving, dtype):
    texts = ["what is the value", "a class", "x"]
    exact = embed(serving, texts, "org/tiny")
    got = embed(serving, texts, f"tiny-{dtype}")
    assert cosine(got, exact).min() > 0.99
    assert np.abs(got - exact).max() > 1e-6, "it must not be the float32 model that answers"


def test_token_ids_with_and_without_special_tokens(serving, reference, expected):
    whole = reference.tokenizer(TEXTS[:4])["input_ids"]
    for ids in (whole, [row[1:-1] for row in whole]):
        np.testing.assert_allclose(embed(serving, ids), expected[:4], atol=1e-5)
    np.testing.assert_allclose(embed(serving, whole[0]), expected[:1], atol=1e-5)


def test_truncation(serving, reference):
    long = " ".join(TEXTS[:40])
    status, answer = serving.post({"model": "minilm-float32", "input": ["short", long], "truncate": True})
    assert status == 200
    assert "truncated" not in answer["data"][0]
    assert answer["data"][1]["truncated"] is True
    np.testing.assert_allclose(vectors(answer)[1:], reference.encode([long]), atol=1e-5)
    left = embed(serving, [long], truncation_side="left")
    tail = reference.tokenizer.decode(reference.tokenizer(long)["input_ids"][-255:-1])
    assert cosine(left, reference.encode([tail])).min() > 0.99
    # This model was added with --truncation right: it cuts unless the request forbids it.
    status, answer = serving.post({"model": "org/tiny", "input": "a " * 100})
    assert (status, answer["data"][0]["truncated"]) == (200, True)
    assert serving.post({"model": "org/tiny", "input": "a " * 100, "truncate": False})[0] == 400


@pytest.mark.parametrize(
    ("body", "message", "code", "param"),
    [
        (
            {"input": ["fine", "word " * 300]},
            "input[1]: the text has 302 tokens, and this model takes 256 tokens",
            "context_length_exceeded",
            "input",
        ),
        (
            {"input": ["fine"] * 150 + ["word " * 300]},
            "input[150]: the text has 302 tokens",
            "context_length_exceeded",
            "input",
        ),
        ({"input": [[5, 6], [999_999]]}, "input[1]: token id 999999 is not in", "invalid_token_id", "input"),
        (
            {"input": "a", "prompt_name": "q"},
            "prompt_name is 'q', which this",
            "unknown_prompt",
            "prompt_name",
        ),
        ({"input": "a", "dimensions": 385}, "takes 1 to 384", "invalid_dimensions", "dimensions"),
    ],
)
def test_what_the_server_refuses_is_the_client_s_to_mend(serving, body, message, code, param):
    status, answer = serving.post({"model": "minilm-float32", **body})
    assert status == 400
    assert answer["error"]["message"].startswith(message) or message in answer["error"]["message"]
    assert (answer["error"]["code"], answer["error"]["param"]) == (code, param)
    assert answer["error"]["type"] == "invalid_request_error"


def test_hundreds_of_long_texts_are_answered_in_parts(serving, expected):
    """More hidden states than the encoder keeps at once: max_batch_tokens is 512 here."""
    rows = [i for i in range(200) if len(TEXTS[i]) > 300][:25] * 10
    got = embed(serving, [TEXTS[i] for i in rows])
    np.testing.assert_allclose(got, expected[rows], atol=1e-5)


def test_megabytes_of_text(serving):
    huge = "word " * 1_500_000
    status, answer = serving.post({"model": "minilm-float32", "input": [huge], "truncate": True})
    assert (status, answer["data"][0]["truncated"]) == (200, True)
    status, answer = serving.post({"model": "minilm-float32", "input": [huge]})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    status, answer = serving.post({"model": "minilm-float32", "input": [4 * huge], "truncate": True})
    assert status == 400
    assert "GATEWAY_MAX_TEXT_BYTES" in answer["error"]["message"]
    assert serving.post(b" " * (33 * 2**20))[0] == 413


def test_bad_requests_do_not_spoil_their_neighbours(serving, expected):
    def client(number):
        if number % 3 == 0:
            return number, serving.post({"model": "minilm-float32", "input": [TEXTS[number], "word " * 300]})
        return number, serving.post({"model": "minilm-float32", "input": [TEXTS[number]], "truncate": True})

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(client, range(96)))
    for number, (status, answer) in answers:
        if number % 3 == 0:
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        else:
            assert status == 200
            np.testing.assert_allclose(vectors(answer)[0], expected[number], atol=1e-5)


def test_models_and_readiness(serving):
    status, models = serving.get("/v1/models")
    assert [model["id"] for model in models["data"]] == [
        "all-MiniLM-L6-v2",
        "minilm-float32",
        "org/tiny",
        "tiny-bfloat16",
        "tiny-float16",
    ]
    assert [model["dimensions"] for model in models["data"]] == [384, 384, 24, 24, 24]
    assert serving.get("/v1/models/org/tiny")[1]["max_length"] == 48
    assert serving.get("/ready")[0] == 200
    assert serving.get("/health") == (200, {"status": "ok"})
    status, answer = serving.post({"model": "nothing", "input": "a"})
    assert status == 404
    assert "all-MiniLM-L6-v2, minilm-float32, org/tiny" in json.dumps(answer)


def test_without_a_model_the_first_one_answers(serving):
    status, answer = serving.post({"input": "text_input"})
    assert (status, answer["model"]) == (200, "all-MiniLM-L6-v2")
