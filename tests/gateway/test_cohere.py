import asyncio
import base64

import numpy as np
import pytest
import uvicorn

from gateway.app import create_app
from gateway.batches import Content
from gateway.quantization import QUANTIZATIONS
from gateway.settings import Settings
from tests.gateway.conftest import running
from tests.support.fake_inference import BROKEN, MULTIMODAL, PIPELINE, RERANKER, TOWERS, FakeInference, vector
from tests.support.oracle import ask

IMAGE = b"\x89PNG\r\n\x1a\n" + b"-" * 8
URL = f"data:image/png;base64,{base64.b64encode(IMAGE).decode()}"
TEXTS = ["a", "bb", "ccc"]
VECTORS = np.stack([vector(text.encode()) for text in TEXTS])
SEEN, BOTH = Content(b"", (IMAGE,)), Content(b"hi", (IMAGE,))
CONTENT = {"content": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": URL}}]}


@pytest.fixture
async def inference():
    return FakeInference([MULTIMODAL, TOWERS, PIPELINE, RERANKER])


@pytest.fixture
async def client(inference):
    async with running(inference, max_items=10) as made:
        yield made


async def test_the_second_shape(client, inference):
    answer = await client.post(
        "/v2/embed", json={"model": "org/gme", "texts": TEXTS, "input_type": "clustering"}
    )
    body = answer.json()
    assert body.pop("id").startswith("embed-")
    np.testing.assert_allclose(body.pop("embeddings")["float"], VECTORS, rtol=1e-6)
    assert body == {
        "response_type": "embeddings_by_type",
        "texts": TEXTS,
        "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 6}},
    }
    assert inference.calls[-1] == ([b"a", b"bb", b"ccc"], {"truncation": "right"})


async def test_the_first_shape(client):
    bare = (await client.post("/v1/embed", json={"texts": TEXTS})).json()
    np.testing.assert_allclose(bare["embeddings"], VECTORS, rtol=1e-6)
    assert (bare["response_type"], bare["texts"]) == ("embeddings_floats", TEXTS)
    assert bare["meta"]["api_version"] == {"version": "1"}
    typed = (await client.post("/v1/embed", json={"texts": TEXTS, "embedding_types": ["float"]})).json()
    assert typed["embeddings"] == {"float": bare["embeddings"]}
    assert typed["response_type"] == "embeddings_by_type"


async def test_every_type_at_once(client):
    kinds = ["ubinary", "float", "int8", "uint8", "binary", "base64"]
    body = (await client.post("/v2/embed", json={"texts": TEXTS, "embedding_types": kinds})).json()
    assert list(body["embeddings"]) == kinds
    for kind, quantize in QUANTIZATIONS.items():
        assert body["embeddings"][kind] == quantize(VECTORS).tolist()
    for row, text in zip(body["embeddings"]["base64"], VECTORS, strict=True):
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(row), "<f4"), text)


async def test_images_and_mixed_inputs(client, inference):
    body = (await client.post("/v2/embed", json={"images": [URL, URL], "input_type": "image"})).json()
    np.testing.assert_allclose(body["embeddings"]["float"], [vector(SEEN)] * 2, rtol=1e-6)
    assert body["texts"] == []
    assert body["meta"]["billed_units"]["images"] == 2
    answer = await client.post("/v2/embed", json={"inputs": [{"content": [{"text": "a"}]}, CONTENT]})
    assert answer.status_code == 200, answer.text
    assert inference.calls[-1][0] == [b"a", BOTH]
    assert answer.json()["meta"]["billed_units"]["images"] == 1


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({"input_type": "search_query"}, {"role": "query"}),
        ({"input_type": "search_document"}, {"role": "document"}),
        ({"input_type": "classification"}, {}),
        ({"truncate": "END"}, {}),
        ({"truncate": "START"}, {"truncation": "left"}),
        ({"truncate": "NONE"}, {"truncation": "error"}),
        ({"truncate": False}, {"truncation": "error"}),
        ({"truncate": True}, {}),
        ({"truncate": None, "priority": 3, "model": None}, {}),
        ({"max_tokens": 5, "output_dimension": 4}, {"max_tokens": 5, "dimensions": 4}),
        (
            {"prompt": "p", "instruction": "i", "normalize": True},
            {"prompt": "p", "instruction": "i", "normalize": True},
        ),
        ({"prompt_name": "query"}, {"prompt_name": "query"}),
    ],
)
async def test_fields_become_request_parameters(client, inference, fields, parameters):
    assert (await client.post("/v2/embed", json={"texts": ["a"], **fields})).status_code == 200
    assert inference.calls[-1][1] == {"truncation": "right"} | parameters


async def test_what_was_cut_is_told(client):
    body = (await client.post("/v2/embed", json={"texts": ["a", "x" * 17, "y" * 20]})).json()
    assert body["meta"]["warnings"] == ["texts[1] was cut to 17 tokens", "texts[2] was cut to 20 tokens"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "a request has one of texts, images and inputs; this one has none of them"),
        ({"texts": ["a"], "images": [URL]}, "this one has texts and images"),
        ({"texts": []}, "texts is an empty list; send at least one item"),
        ({"texts": ["a", ""]}, "texts[1] is an empty string; leave it out, or send some text"),
        ({"texts": ["a", 3]}, "texts.1 is 3: it should be a valid string"),
        ({"texts": ["a"] * 11}, "texts has 11 items; at most 10 can be sent in one request"),
        ({"images": ["cat.png"]}, "images[0]: 'cat.png' is none of what is taken"),
        (
            {"inputs": [{"content": [{"type": "video_url", "video_url": URL}]}]},
            "inputs[0].content[0] holds a video",
        ),
        (
            {"images": [URL], "model": "org/tiny"},
            "the model org/tiny takes texts only, and images[0] holds an image",
        ),
        (
            {"inputs": [CONTENT], "model": "org/clip"},
            "inputs[0] holds a text and an image; the model org/clip embeds",
        ),
        ({"texts": ["a"], "truncate": "MIDDLE"}, "truncate"),
        ({"texts": ["a"], "embedding_types": []}, "embedding_types is []: it should have at least one item"),
        ({"texts": ["a"], "embedding_types": ["int4"]}, "embedding_types.0 is 'int4'"),
        ({"texts": ["a"], "input_type": "poem"}, "input_type is 'poem'"),
        ({"texts": ["a"], "output_dimension": 9}, "output_dimension is 9; org/gme takes 1 to 8"),
        ({"texts": ["a"], "model": "org/reranker"}, "the model org/reranker does not serve embed"),
        (
            {"inputs": [{"content": [{"image": base64.b64encode(IMAGE + BROKEN).decode()}]}]},
            "inputs[0]: the image cannot be read",
        ),
    ],
)
async def test_refusals_have_coheres_shape(client, body, message):
    for path in ("/v1/embed", "/v2/embed"):
        answer = await client.post(path, json=body)
        assert answer.status_code == 400
        assert set(answer.json()) == {"message"}
        assert message in answer.json()["message"]


async def test_a_model_that_is_not_there(client):
    answer = await client.post("/v2/embed", json={"texts": ["a"], "model": "x"})
    assert (answer.status_code, set(answer.json())) == (404, {"message"})


async def test_coheres_own_clients():
    config = uvicorn.Config(
        create_app(Settings(), FakeInference([MULTIMODAL, PIPELINE])), port=0, log_level="warning"
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        got = await asyncio.to_thread(
            ask, "cohere_embed", url=f"http://127.0.0.1:{port}", texts=TEXTS, image=URL
        )
    finally:
        server.should_exit = True
        await serving
    second, first = got["second"], got["first"]
    np.testing.assert_allclose(second["vectors"]["float"], VECTORS, rtol=1e-6)
    for kind, quantize in QUANTIZATIONS.items():
        assert second["vectors"][kind] == quantize(VECTORS).tolist()
    assert (second["texts"], second["version"], second["tokens"], second["images"]) == (TEXTS, "2", 6, 1)
    for seen in (second["image"], first["image"]):
        np.testing.assert_allclose(seen, [vector(SEEN)], rtol=1e-6)
    np.testing.assert_allclose(second["both"], [vector(BOTH)], rtol=1e-6)
    assert (first["kind"], first["texts"]) == ("embeddings_floats", TEXTS * 100)
    np.testing.assert_allclose(first["many"], np.tile(VECTORS, (100, 1)), rtol=1e-6)
    assert first["int8"] == QUANTIZATIONS["int8"](vector(b"x" * 20)[None]).tolist()
    assert first["warnings"] == ["texts[0] was cut to 20 tokens"]
    np.testing.assert_allclose(got["awaited"], VECTORS, rtol=1e-6)
    assert got["refused"] == [
        ["BadRequestError", {"message": "texts[0] is an empty string; leave it out, or send some text"}],
        [
            "BadRequestError",
            {
                "message": "the model org/tiny takes texts only, and images[0] holds an image; images are "
                "taken by org/gme"
            },
        ],
        ["NotFoundError", {"message": "the model 'x' does not exist here; there are: org/gme, org/tiny"}],
    ]
    np.testing.assert_allclose(got["langchain"][0], VECTORS, rtol=1e-6)
    np.testing.assert_allclose(got["langchain"][1], VECTORS[0], rtol=1e-6)
