"""Items with images on every route that embeds `input`: what a client writes, and what is sent on."""

import asyncio
import base64

import numpy as np
import openai
import pytest
from aiohttp import web

from gateway import drafts
from gateway.batches import Content
from gateway.errors import BadRequest
from gateway.images import ImageLoader
from tests.gateway.conftest import running
from tests.support.fake_inference import (
    BROKEN,
    KINDS,
    MULTIMODAL,
    PIPELINE,
    TOWERS,
    FakeInference,
    vector,
)
from tests.support.image_sites import site


def png(mark):
    """What is taken for an image file: only an image stage would look behind the head."""
    return b"\x89PNG\r\n\x1a\n" + b"-" * 8 + mark


def url(mark):
    return f"data:image/png;base64,{base64.b64encode(png(mark)).decode()}"


A, B = url(b"a"), url(b"b")
BARE = base64.b64encode(png(b"c")).decode()
IMAGE_A, IMAGE_B = Content(b"", (png(b"a"),)), Content(b"", (png(b"b"),))
BOTH = Content(b"hi", (png(b"a"),))
EMBED = "/v1/embeddings"


@pytest.fixture
async def inference():
    return FakeInference([MULTIMODAL, TOWERS, PIPELINE])


@pytest.fixture
async def client(inference):
    async with running(inference, max_items=300, max_body_bytes=200_000) as made:
        yield made


@pytest.fixture
def loads(monkeypatch):
    """What images were asked for."""
    asked = []
    load = ImageLoader.load

    async def watched(self, reference, field):
        asked.append(field)
        return await load(self, reference, field)

    monkeypatch.setattr(ImageLoader, "load", watched)
    return asked


def message_of(answer, status=400):
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("given", "items"),
    [
        ("hi", [b"hi"]),
        ({"text": "hi"}, [b"hi"]),
        ({"type": "text", "text": "hi"}, [b"hi"]),
        ({"type": "input_text", "text": "hi"}, [b"hi"]),
        ({"image": A}, [IMAGE_A]),
        ({"image": BARE}, [Content(b"", (png(b"c"),))]),
        ({"image": [A, B]}, [Content(b"", (png(b"a"), png(b"b")))]),
        ({"image": {"url": A}}, [IMAGE_A]),
        ({"text": "hi", "image": A}, [BOTH]),
        ({"text": "", "image": A}, [IMAGE_A]),
        ({"text": None, "image": A, "video": None}, [IMAGE_A]),
        ({"text": "hi", "image": None}, [b"hi"]),
        ({"type": "image_url", "image_url": {"url": A, "detail": "low"}}, [IMAGE_A]),
        ({"type": "image_url", "image_url": A, "uuid": "x"}, [IMAGE_A]),
        ({"type": "image", "image": A}, [IMAGE_A]),
        ({"type": "input_image", "image_url": A, "detail": "auto"}, [IMAGE_A]),
        ({"content": "hi"}, [b"hi"]),
        (
            {"content": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": A}}]},
            [BOTH],
        ),
        ({"role": "user", "content": [{"image": A}, "h", {"text": "i"}]}, [BOTH]),
        ({"role": "user", "content": [{"image": B}, {"image": A}]}, [Content(b"", (png(b"b"), png(b"a")))]),
        (
            ["a", {"image": A}, {"text": "hi", "image": A}, {"text": "b"}, {"content": [{"image": B}]}],
            [b"a", IMAGE_A, BOTH, b"b", IMAGE_B],
        ),
        # Parts of a list stand for themselves.
        ([{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": A}}], [b"hi", IMAGE_A]),
    ],
)
async def test_the_forms_of_an_item(client, inference, given, items):
    answer = await client.post(EMBED, json={"model": "org/gme", "input": given})
    assert answer.status_code == 200, answer.text
    assert inference.calls[-1][0] == items
    data = answer.json()["data"]
    assert [row["index"] for row in data] == list(range(len(items)))
    for row, item in zip(data, items, strict=True):
        np.testing.assert_allclose(row["embedding"], vector(item), rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": ""}, "input[0] is an empty string; leave it out, or send some text"),
        ({"text": "", "image": []}, "input[0] is an empty string"),
        ({"content": []}, "input[0] is an empty string"),
        ({}, 'input[0] is an object that holds nothing; texts stand in {"text": "..."}, images in {"image"'),
        ({"text": None}, "input[0] is an object that holds nothing"),
        ({"pdf": A}, "input[0] is an object that holds pdf; texts stand in"),
        ({"text": "a", "content": "b"}, "input[0] is an object that holds text, content"),
        ({"text": ["a"]}, "input[0].text is a list; it takes a string"),
        (["a", {"image": 3}], "input[1].image is a number; an image is a URL, a data URL or base64"),
        ({"image": [A, None]}, "input[0].image[1] is null; an image is"),
        ({"image_url": {"uri": A}}, "input[0].image_url.url is null; an image is"),
        ({"video": A}, "input[0] holds a video (video); texts and images are served"),
        ({"text": "a", "audio": A}, "input[0] holds audio (audio); texts and images are served"),
        ({"type": "video_url", "video_url": {"url": A}}, "input[0] holds a video (video_url)"),
        ({"type": "input_audio", "input_audio": {}}, "input[0] holds audio (input_audio)"),
        ({"content": [{"type": "audio_url", "audio_url": A}]}, "input[0].content[0] holds audio (audio_url)"),
        ({"type": "file", "file": A}, "input[0] is of type 'file'; texts and images are served"),
        ({"type": ["text"], "text": "a"}, "input[0] is of type \"['text']\"; texts"),
        ({"content": {"text": "a"}}, "input[0].content is an object; it takes a string, or a list of parts"),
        ({"content": ["a", 3]}, "input[0].content[1] is a number"),
        ({"content": [{"content": "a"}]}, "input[0].content[0] holds a content of its own"),
        ({"role": "assistant", "content": "a"}, "input[0] has the role 'assistant'; an item is a message of"),
        (
            [{"image": A}, 3],
            "input[1] is a number; after a text or an image, every item must be one of these",
        ),
        ({"image": [A] * 17}, "input[0] has 17 images; one item may have 16"),
        ([{"image": A}] * 301, "input has 301 items; at most 300 can be sent"),
        ([{"image": A}] * 257, "the request has 257 images; at most 256 can be sent in one"),
    ],
)
async def test_items_that_cannot_be_read(client, loads, given, message):
    answer = await client.post(EMBED, json={"model": "org/gme", "input": given})
    assert message in message_of(answer)
    assert answer.json()["error"]["param"] == "input"
    assert loads == []


async def test_an_image_that_cannot_be_had_is_named(client):
    body = {"model": "org/gme", "input": ["a", {"image": [A, "http://example.com/a.png"]}]}
    assert message_of(await client.post(EMBED, json=body)).startswith(
        "input[1].image[1]: this server does not fetch URLs"
    )


async def test_as_many_images_as_may_be(client):
    body = {"model": "org/gme", "input": [{"image": [A] * 16}] * 16}
    assert (await client.post(EMBED, json=body)).status_code == 200


async def test_a_model_of_texts_fetches_nothing(client, loads):
    body = {"model": "org/tiny", "input": ["a", {"content": [{"text": "b"}, {"image": A}]}]}
    assert message_of(await client.post(EMBED, json=body)) == (
        "the model org/tiny takes texts only, and input[1] holds an image; images are taken by "
        "org/gme, org/clip"
    )
    body = {"model": "nobody", "input": {"image": A}}
    assert "'nobody' does not exist" in message_of(await client.post(EMBED, json=body), 404)
    async with running(FakeInference()) as other:
        answer = await other.post(EMBED, json={"input": {"image": A}})
    assert message_of(answer) == "the model org/tiny takes texts only, and input[0] holds an image"
    assert loads == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"text": "hi", "image": A},
            "holds a text and an image; the model org/clip embeds a text or an image: send them as 2 items",
        ),
        (
            {"image": [A, B]},
            "holds 2 images; the model org/clip embeds a text or an image: send them as 2 items",
        ),
        (
            {"content": ["a", {"image": [A, B]}]},
            "holds a text and 2 images; the model org/clip embeds a text or an image: send them as 3 items",
        ),
    ],
)
async def test_a_model_that_does_not_fuse(client, loads, given, message):
    answer = await client.post(EMBED, json={"model": "org/clip", "input": ["a", given]})
    assert message_of(answer) == f"input[1] {message}"
    assert loads == []
    answer = await client.post(EMBED, json={"model": "org/clip", "input": ["a", {"image": A}]})
    assert answer.status_code == 200


async def test_without_a_name_a_model_that_takes_images_answers():
    async with running(FakeInference([PIPELINE, MULTIMODAL])) as client:
        assert (await client.post(EMBED, json={"input": ["a"]})).json()["model"] == "org/tiny"
        assert (await client.post(EMBED, json={"input": ["a", {"image": A}]})).json()["model"] == "org/gme"


async def test_a_refused_image_is_named_in_every_dialect(client):
    given = ["a", {"image": url(BROKEN)}]
    answer = await client.post(EMBED, json={"model": "org/gme", "input": given})
    assert message_of(answer) == "input[1]: the image cannot be read"
    assert answer.json()["error"] | {"message": ""} == {
        "message": "",
        "type": "invalid_request_error",
        "param": "input",
        "code": "invalid_image",
    }
    answer = await client.post("/v1/embeddings/dense", json={"model": "org/gme", "input": given})
    assert answer.status_code == 400
    assert answer.json()["message"] == "input[1]: the image cannot be read"
    answer = await client.post(
        "/v1/embeddings/similarity", json={"model": "org/gme", "left": "a", "right": given}
    )
    assert answer.json()["message"] == "right[1]: the image cannot be read"


@pytest.mark.parametrize("path", ["/embeddings", "/v1/embeddings/hybrid", "/v1/embeddings/dense"])
async def test_other_routes_that_embed_input(client, inference, path):
    answer = await client.post(path, json={"model": "org/gme", "input": ["a", {"text": "hi", "image": A}]})
    assert answer.status_code == 200, answer.text
    assert inference.calls[-1][0] == [b"a", BOTH]
    row = answer.json()["data"][1]
    np.testing.assert_allclose(row.get("embedding", row.get("dense")), vector(BOTH), rtol=1e-6)


async def test_similarity_of_texts_to_images(client, inference):
    body = {"left": "a", "right": [{"image": A}, {"image": B}]}
    answer = (await client.post("/v1/embeddings/similarity", json=body)).json()
    assert answer["model"] == "org/gme"
    expected = [[float(vector(b"a") @ vector(item)) for item in (IMAGE_A, IMAGE_B)]]
    np.testing.assert_allclose(answer["similarity"], expected, rtol=1e-5)
    many = [{"image": A}] * 129
    answer = await client.post("/v1/embeddings/similarity", json={"left": many, "right": many})
    assert "the request has 258 images; at most 256" in answer.json()["message"]


async def test_routes_of_texts_refuse_images():
    async with running(FakeInference([KINDS, MULTIMODAL])) as client:
        for path in ("/embed", "/tokenize"):
            answer = await client.post(path, json={"model": "org/gme", "inputs": ["a", {"image": A}]})
            assert answer.json()["error"] == (
                "inputs[1] holds an image; texts only are taken here, and images at /v1/embeddings"
            )


async def test_the_request_of_sglangs_seed(inference):
    async def picture(request):
        return web.Response(body=png(b"a"), content_type="image/png")

    async with site({"/cat.png": picture}) as pictures, running(inference, image_hosts="127.0.0.1") as client:
        body = {"model": "gme", "input": [{"text": "a cat"}, {"image": f"{pictures.url}/cat.png"}]}
        answer = await client.post(EMBED, json=body)
    assert answer.status_code == 200, answer.text
    assert inference.calls[-1][0] == [b"a cat", IMAGE_A]


class TestModality:
    async def test_strings_are_references(self, client, inference):
        for given in (A, [A, BARE], [A, {"image": BARE}]):
            answer = await client.post(EMBED, json={"input": given, "modality": "image"})
            assert answer.status_code == 200, answer.text
        assert inference.calls[-1][0] == [IMAGE_A, Content(b"", (png(b"c"),))]

    async def test_text_is_the_default(self, client, inference):
        await client.post(EMBED, json={"input": "a", "modality": "text"})
        assert inference.calls[-1][0] == [b"a"]

    async def test_infinity_s_clients_send_no_dimensions_as_zero(self, client, inference):
        body = {"input": ["a"], "modality": "text", "dimensions": 0}
        answer = await client.post(EMBED, json=body)
        assert answer.status_code == 200, answer.text
        assert "dimensions" not in inference.calls[-1][1]
        del body["modality"]
        answer = await client.post(EMBED, json=body)
        assert answer.status_code == 400
        assert "dimensions" in message_of(answer)

    async def test_others(self, client):
        answer = await client.post(EMBED, json={"input": A, "modality": "audio"})
        assert message_of(answer) == "modality is 'audio': it should be 'text' or 'image'"
        answer = await client.post(EMBED, json={"input": ["cat.png"], "modality": "image"})
        assert message_of(answer).startswith("input[0]: 'cat.png' is none of what is taken")
        answer = await client.post(EMBED, json={"input": [[1, 2]], "modality": "image"})
        assert message_of(answer) == "input takes images here, and input[0] is a list"


class TestMessages:
    async def test_one_item(self, client, inference):
        message = {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": A}}, {"text": "hi"}],
        }
        answer = await client.post(EMBED, json={"model": "org/gme", "messages": [message], "input": None})
        assert len(answer.json()["data"]) == 1
        assert inference.calls[-1] == ([BOTH], {})

    async def test_the_system_message_is_the_instruction(self, client, inference):
        for system in ("Find it", [{"type": "text", "text": "Find it"}]):
            messages = [{"role": "system", "content": system}, {"role": "user", "content": "hi"}]
            await client.post(EMBED, json={"model": "org/gme", "messages": messages})
            assert inference.calls[-1] == ([b"hi"], {"instruction": "Find it"})

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({}, "the field input is missing"),
            ({"messages": "hi"}, "messages is a string; it takes a list of messages"),
            ({"messages": []}, "messages has 0 messages, of nobody; it makes one item"),
            (
                {"messages": [{"role": "user", "content": "a"}] * 2},
                "messages has 2 messages, of user, user; it makes",
            ),
            (
                {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
                "messages has 2 messages, of user, assistant; it makes one item",
            ),
            ({"messages": [{"role": "system", "content": "a"}]}, "messages has 1 messages, of system"),
            ({"messages": ["a"]}, "messages has 1 messages, of None"),
            ({"messages": [{"role": "user"}]}, "messages[0] is an object that holds role"),
            ({"messages": [{"role": "user", "content": ""}]}, "messages[0] is an empty string"),
            (
                {"messages": [{"role": "user", "content": "a"}], "input": "a"},
                "input and messages are two forms",
            ),
            (
                {"messages": [{"role": "user", "content": [{"image": 3}]}]},
                "messages[0].content[0].image is a number",
            ),
            (
                {
                    "messages": [
                        {"role": "system", "content": [{"image": A}]},
                        {"role": "user", "content": "a"},
                    ]
                },
                "messages[0] holds an image; a system message is a text",
            ),
            (
                {
                    "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}],
                    "instruction": "b",
                },
                "the system message is the instruction, and instruction is there too",
            ),
        ],
    )
    async def test_what_is_no_item(self, client, body, message):
        assert message in message_of(await client.post(EMBED, json={"model": "org/gme", **body}))

    async def test_a_model_of_texts(self, client):
        messages = [{"role": "user", "content": [{"image": A}]}]
        answer = await client.post(EMBED, json={"model": "org/tiny", "messages": messages})
        assert "takes texts only, and messages[0] holds an image" in message_of(answer)


async def test_the_official_client(client, inference):
    sdk = openai.AsyncOpenAI(api_key="none", base_url="http://gateway/v1", http_client=client, max_retries=0)
    answer = await sdk.embeddings.create(model="org/gme", input=["a", {"image": A}])
    np.testing.assert_allclose(answer.data[1].embedding, vector(IMAGE_A), rtol=1e-6)
    content = [{"type": "image_url", "image_url": {"url": A}}, {"type": "text", "text": "hi"}]
    answer = await sdk.embeddings.create(
        model="org/gme",
        input=openai.NOT_GIVEN,
        encoding_format="float",
        extra_body={"messages": [{"role": "user", "content": content}]},
    )
    np.testing.assert_allclose(answer.data[0].embedding, vector(BOTH), rtol=1e-6)


async def test_models_tell_what_they_take(client):
    models = (await client.get("/v1/models")).json()["data"]
    assert {model["id"]: model["modalities"] for model in models} == {
        "org/gme": ["text", "image"],
        "org/clip": ["text", "image"],
        "org/tiny": ["text"],
    }


class TestLoading:
    """Many images of one request."""

    @pytest.fixture
    def loader(self, monkeypatch):
        """Takes a number as a reference: waits for so many turns, and fails below 2. 99 is for ever."""
        running_now = []
        most = []

        async def load(self, reference, field):
            running_now.append(field)
            most.append(len(running_now))
            try:
                if reference == "99":
                    await asyncio.Event().wait()
                for _ in range(int(reference)):
                    await asyncio.sleep(0)
                if int(reference) < 2:
                    raise BadRequest(f"{field}: no", param=field)
                return reference.encode()
            finally:
                running_now.remove(field)

        monkeypatch.setattr(ImageLoader, "load", load)
        return running_now, most

    async def embed(self, references):
        async with running(FakeInference([MULTIMODAL])) as client:
            return await client.post(EMBED, json={"input": [{"image": one} for one in references]})

    async def test_a_few_at_once_and_in_order(self, loader):
        numbers = [str(2 + i * 7 % 5) for i in range(40)]
        answer = await self.embed(numbers)
        assert answer.status_code == 200
        for row, number in zip(answer.json()["data"], numbers, strict=True):
            np.testing.assert_allclose(row["embedding"], vector(Content(b"", (number.encode(),))), rtol=1e-6)
        assert max(loader[1]) == 4

    async def test_the_first_bad_one_is_told_and_the_rest_is_given_up(self, loader):
        answer = await self.embed(["9", "1", "0", "99"])
        assert message_of(answer) == "input[1].image: no"
        assert loader[0] == []

    async def test_all_of_them_have_one_deadline(self, inference):
        late = asyncio.Event()

        async def quick(request):
            return web.Response(body=png(b"a"), content_type="image/png")

        async def slow(request):
            await late.wait()
            return web.Response(body=png(b"a"), content_type="image/png")

        settings = {"image_hosts": "127.0.0.1", "images_timeout_s": 0.3}
        async with (
            site({"/quick": quick, "/slow": slow}) as pictures,
            running(inference, **settings) as client,
        ):
            given = [{"image": f"{pictures.url}/{name}"} for name in ("quick", "slow", "quick")]
            answer = await client.post(EMBED, json={"model": "gme", "input": given})
            late.set()
        assert message_of(answer).startswith(
            "input[1].image and all images before it were not there within 0.3 s; send fewer at a time"
        )

    async def test_the_requests_own_deadline_ends_the_wait_for_them(self, inference):
        late = asyncio.Event()

        async def slow(request):
            await late.wait()
            return web.Response(body=png(b"a"), content_type="image/png")

        async with (
            site({"/slow": slow}) as pictures,
            running(inference, image_hosts="127.0.0.1", image_timeout_s=60, images_timeout_s=60) as client,
        ):
            body = {"model": "gme", "input": [{"image": f"{pictures.url}/slow"}], "timeout": 0.2}
            answer = await client.post(EMBED, json=body)
            late.set()
            assert message_of(answer, 504) == (
                "what the request's images are fetched from did not answer within 0.2 s, its timeout; give "
                "it more time, or send fewer or shorter inputs"
            )
            answer = await client.post(EMBED, json={**body, "timeout": 50})
            assert answer.status_code == 200, "a control"

    async def test_all_of_them_together_are_bounded(self, loader, monkeypatch):
        monkeypatch.setattr(drafts, "_MAX_IMAGE_BYTES", 10)
        assert (await self.embed(["2"] * 10)).status_code == 200
        answer = await self.embed(["2"] * 40)
        assert "the images of the request have more than 10 bytes in all" in message_of(answer, 413)
        assert len(loader[1]) < 35, "what comes after is not fetched"


class TestCounts:
    """Told before anything is read: a body has room for a million parts."""

    @pytest.mark.parametrize(
        ("item", "message"),
        [
            ({"content": [{"text": "a"}] * 65}, "input[0] has 65 parts; one item may have 64"),
            ({"image": ["x"] * 17}, "input[0] has 17 images; one item may have 16"),
            (
                {"content": [{"image": ["x"] * 17}]},
                "input[0].content[0].image has 17 images; one item may have 16",
            ),
        ],
    )
    async def test_of_one_item(self, client, item, message):
        assert message_of(await client.post(EMBED, json={"input": [item]})) == message
        told = message.replace("input[0]", "messages[0]")
        if "content" in item:
            body = {"messages": [{"role": "user", **item}]}
            assert message_of(await client.post(EMBED, json=body)) == told

    async def test_of_a_request(self, inference):
        async with running(inference, max_items=1000) as client:
            items = [{"content": [{"text": "a"}] * 60}] * 140
            answer = await client.post(EMBED, json={"input": items})
        assert message_of(answer) == "input has 8400 parts and images in all; a request may have 8192"


class TestUnnamed:
    """Without a name a model is found that takes what is sent."""

    async def test_what_is_fused_goes_where_it_is_taken(self):
        inference = FakeInference([TOWERS, MULTIMODAL])
        async with running(inference) as client:
            for item in ({"text": "a", "image": A}, {"image": [A, BARE]}):
                answer = await client.post(EMBED, json={"input": [item]})
                assert answer.json()["model"] == "org/gme"
            answer = await client.post(EMBED, json={"input": [{"image": A}, "a"]})
            assert answer.json()["model"] == "org/clip"
            left = {"left": [{"image": A}], "right": [{"text": "a", "image": A}]}
            answer = await client.post("/v1/embeddings/similarity", json=left)
            assert answer.json()["model"] == "org/gme"
