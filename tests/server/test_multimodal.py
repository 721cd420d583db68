"""Models of texts and images through the real server and gateway, against the libraries that define them."""

import asyncio
import base64
import concurrent.futures
import contextlib
import io
import os
import signal
import threading
import warnings
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import openai
import pytest
import tritonclient.grpc
from PIL import Image
from sentence_transformers import SentenceTransformer

from tests.support import multimodal
from tests.support.multimodal import ClipReference, QwenReference, bomb, encoded, picture
from tests.support.oracle import ask
from tests.support.server import COMMAND, NO_PINGS, serve, wait_until
from triton_embeddings import models

TOLERANCE = 1e-5
WIDE, TALL, TINY, LONG = picture(90, 40, 1), picture(60, 200, 2), picture(1, 1, 3), picture(1, 4000, 4)
TEXT = "this is a value"
# Texts, images, both, and images of very different sizes.
ITEMS = [
    (TEXT, []),
    ("", [WIDE]),
    ("x", [TALL]),
    ("the value of this class", []),
    ("", [TINY]),
    (TEXT, [WIDE]),
    ("", [LONG]),
]
APART = [(text, [] if text else images) for text, images in ITEMS]
FEW = {"min_image_tokens": 4, "max_image_tokens": 160}
QWEN3_PROMPT = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
QWEN3_INSTRUCTION = "Represent the user's input."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint in each published layout."""
    made = tmp_path_factory.mktemp("multimodal")
    multimodal.clip(made / "clip")
    multimodal.gme(made / "gme")
    multimodal.qwen2_5_vl(made / "qwen2_5-vl")
    multimodal.qwen3_vl(made / "qwen3-vl")
    return made


@contextlib.contextmanager
def image_site(files):
    """A web server on loopback with files by path. Gives its address, and the paths that it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            data = files.get(self.path)
            self.send_response(200 if data else 404)
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *arguments):
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.05))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def serving(tmp_path_factory, folder):
    """All of them in float32; GME a second time with the positions of its own code."""
    place = tmp_path_factory.mktemp("serving-multimodal")
    options = {
        "clip": {},
        "gme": FEW,
        "gme-plain": {"image_positions": "plain", "chat_template": "gme-qwen2-vl", **FEW},
        "qwen2_5-vl": FEW,
        "qwen3-vl": FEW,
    }
    for name, given in options.items():
        path = folder / name.removesuffix("-plain")
        models.add(place / "models", str(path), name, {"dtype": "float32", **given})
    with serve(
        place / "output",
        "--model-repository",
        place / "models",
        "--image-hosts",
        "127.0.0.1",
        GATEWAY_CANARY_INTERVAL_S="60",
        **NO_PINGS,
    ) as running:
        yield running


def data_url(image, kind="PNG"):
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded(image, kind)).decode()}"


def written(item):
    """An item as SGLang's clients write it."""
    text, images = item
    found = {"text": text} if text else {}
    if images:
        found["image"] = data_url(*images)
    return found


def post(serving, body, path="/v1/embeddings"):
    status, answer = serving.post(body, path)
    assert status == 200, answer
    return answer


def embed(serving, model, items, **fields):
    answer = post(serving, {"model": model, "input": list(map(written, items)), **fields})
    return np.array([row["embedding"] for row in answer["data"]])


def fetched(image):
    """What GME's own code makes of an image before its processor."""
    from backends.image_processing import gme_fetched_size

    return image.resize(gme_fetched_size(*image.size))


def gme_items(items):
    return [(text, list(map(fetched, images))) for text, images in items]


@pytest.fixture(scope="module")
def gme(folder):
    return QwenReference(folder / "gme", min_pixels=4 * 784, max_pixels=160 * 784)


@pytest.fixture(scope="module")
def expected(folder, gme):
    """What transformers makes of ITEMS, or for CLIP of APART, by model."""
    plain = QwenReference(folder / "gme", is_plain=True, min_pixels=4 * 784, max_pixels=160 * 784)
    qwen3 = QwenReference(folder / "qwen3-vl", QWEN3_PROMPT, min_pixels=4 * 1024, max_pixels=160 * 1024)
    qwen2_5 = QwenReference(folder / "qwen2_5-vl", min_pixels=4 * 784, max_pixels=160 * 784)
    # Only GME takes an image of such proportions.
    common = [item for item in ITEMS if LONG not in item[1]]
    return {
        "clip": (APART, ClipReference(folder / "clip")(APART)),
        "gme": (ITEMS, gme(gme_items(ITEMS))),
        "gme-plain": (ITEMS, plain(gme_items(ITEMS))),
        "qwen2_5-vl": (common, qwen2_5(common)),
        "qwen3-vl": (common, qwen3(common, QWEN3_INSTRUCTION)),
    }


MODELS = ["clip", "gme", "gme-plain", "qwen2_5-vl", "qwen3-vl"]


@pytest.mark.parametrize("model", MODELS)
def test_texts_images_and_both_equal_transformers(serving, expected, model):
    items, wanted = expected[model]
    np.testing.assert_allclose(embed(serving, model, items), wanted, atol=TOLERANCE)
    for item, row in zip(items, wanted, strict=True):
        np.testing.assert_allclose(embed(serving, model, [item])[0], row, atol=TOLERANCE)


def test_negative_controls(serving, expected):
    """Each of them would pass for right if the comparison could not fail."""
    _, right = expected["gme"]
    _, plain = expected["gme-plain"]
    differs = np.abs(right - plain).max(axis=1)
    assert differs[[1, 2, 5, 6]].min() > 1e-3, "positions of images show"
    assert differs[[0, 3]].max() < TOLERANCE, "and texts have none"
    text, image = embed(serving, "gme", [(TEXT, []), ("", [WIDE])])
    fused = right[5]
    assert min(np.abs(fused - text).max(), np.abs(fused - image).max()) > 0.01
    turned = embed(serving, "clip", [("", [WIDE.rotate(180)])])[0]
    assert np.abs(turned - expected["clip"][1][1]).max() > 1e-3


def test_clip_equals_sentence_transformers(serving, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = SentenceTransformer(str(folder / "clip"), device="cpu", local_files_only=True)
        wanted = np.concatenate([library.encode([TEXT, "x"]), library.encode([WIDE, TALL])])
    # It does not normalise what has no module for that.
    items = [(TEXT, []), ("x", []), ("", [WIDE]), ("", [TALL])]
    np.testing.assert_allclose(embed(serving, "clip", items, normalize=False), wanted, atol=TOLERANCE)


def test_an_instruction_of_a_request(serving, gme):
    instruction = "Find an image that matches the given text."
    wanted = gme(gme_items(ITEMS), instruction)
    np.testing.assert_allclose(embed(serving, "gme", ITEMS, instruction=instruction), wanted, atol=TOLERANCE)
    bare = gme(gme_items(ITEMS))
    for fields in ({"input_type": "document"}, {"input_type": "query"}):
        np.testing.assert_allclose(embed(serving, "gme", ITEMS, **fields), bare, atol=TOLERANCE)
    assert np.abs(wanted - bare).max() > 0.01, "negative control: the instruction shows"
    body = {"model": "gme", "input": "x", "instruction": "a", "input_type": "document"}
    status, refused = serving.post(body)
    assert (status, refused["error"]["param"]) == (400, "instruction")


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    """SGLang's own launch command, on loopback."""
    place = tmp_path_factory.mktemp("seed")
    path = multimodal.gme(place / "gme-Qwen2-VL-2B-Instruct")
    command = (COMMAND, "serve", "--model-path", path, "--is-embedding", "--host", "127.0.0.1")
    with serve(
        place / "output",
        "--chat-template",
        "gme-qwen2-vl",
        "--dtype",
        "float32",
        "--allow-image-urls",
        "--image-hosts",
        "127.0.0.0/8",
        command=command,
        GATEWAY_CANARY_INTERVAL_S="0.5",
    ) as running:
        yield running, path


def test_the_seed_s_own_request(seed):
    """With an image of a server right here."""
    serving, path = seed
    file = encoded(picture(64, 48, 9), "JPEG")
    with image_site({"/images/023.jpg": file}) as (site, asked):
        text = "Represent this image in embedding space."
        request = {
            "model": "gme-qwen2-vl",
            "input": [{"text": text}, {"image": f"{site}/images/023.jpg"}],
        }
        answer = post(serving, request)
    assert asked == ["/images/023.jpg"]
    shown = fetched(Image.open(io.BytesIO(file)))
    reference = QwenReference(path, min_pixels=256 * 784, max_pixels=1280 * 784)
    wanted = reference([(text, []), ("", [shown])])
    np.testing.assert_allclose([row.get("embedding") for row in answer["data"]], wanted, atol=TOLERANCE)


def test_urls_are_fetched_from_listed_hosts_only(serving, expected):
    with image_site({"/wide.png": encoded(WIDE)}) as (site, asked):
        answer = post(serving, {"model": "gme", "input": [{"image": f"{site}/wide.png"}]})
        np.testing.assert_allclose(answer["data"][0]["embedding"], expected["gme"][1][1], atol=TOLERANCE)
        assert asked == ["/wide.png"]
        for url in ("http://localhost.invalid/x.png", "http://[::1]:1/x.png", "http://169.254.169.254/"):
            status, refused = serving.post({"model": "gme", "input": [{"image": url}]})
            assert status == 400, refused
            assert "input[0].image" in refused["error"]["message"]
        status, refused = serving.post({"model": "all", "input": [{"image": f"{site}/wide.png"}]})
        assert status == 404
        assert asked == ["/wide.png"], "nothing is fetched for a model that is not there"


def counts(serving, model):
    with tritonclient.grpc.InferenceServerClient(serving.grpc) as client:
        return client.get_inference_statistics(model).model_stats[0].execution_count


def test_a_text_runs_no_image_stage(serving):
    before = counts(serving, "gme.image"), counts(serving, "gme.encoder"), counts(serving, "gme.multimodal")
    embed(serving, "gme", [(TEXT, []), ("x", [])])
    assert counts(serving, "gme.image") == before[0]
    assert counts(serving, "gme.multimodal") == before[2]
    assert counts(serving, "gme.encoder") == before[1] + 1
    embed(serving, "gme", [("", [WIDE])])
    assert counts(serving, "gme.image") == before[0] + 1, "negative control: an image does"


def test_texts_and_images_of_many_clients_share_batches(serving, expected):
    items, wanted = expected["gme"]
    before = counts(serving, "gme.encoder")
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        got = list(pool.map(lambda i: embed(serving, "gme", [items[i % len(items)]])[0], range(70)))
    for i, row in enumerate(got):
        np.testing.assert_allclose(row, wanted[i % len(items)], atol=TOLERANCE)
    assert counts(serving, "gme.encoder") - before < 70


def test_the_server_s_own_client(serving, expected):
    items, wanted = expected["gme"]
    with tritonclient.grpc.InferenceServerClient(serving.grpc) as client:
        text = tritonclient.grpc.InferInput("text", [len(items), 1], "BYTES")
        text.set_data_from_numpy(np.array([[t.encode()] for t, _ in items], object))
        files = [[encoded(images[0]) if images else b""] for _, images in items]
        image = tritonclient.grpc.InferInput("image", [len(items), 1], "BYTES")
        image.set_data_from_numpy(np.array(files, object))
        result = client.infer("gme.multimodal", [text, image])
        np.testing.assert_allclose(result.as_numpy("dense"), wanted, atol=TOLERANCE)
        assert result.as_numpy("n_tokens").shape == (len(items), 1)
        broken = tritonclient.grpc.InferInput("image", [len(items), 1], "BYTES")
        broken.set_data_from_numpy(np.array([*files[:2], [b"x"], *files[3:]], object))
        with pytest.raises(tritonclient.grpc.InferenceServerException, match="invalid_image at item 2"):
            client.infer("gme.multimodal", [text, broken])


def test_usage_counts_image_tokens(serving):
    used = [
        post(serving, {"model": "clip", "input": [written(item)]})["usage"]["prompt_tokens"]
        for item in (("x", []), ("", [WIDE]))
    ]
    assert used == [3, 10], "an image of CLIP has nine patches here, and one token for the whole"
    text, image = (
        post(serving, {"model": "gme", "input": [written(item)]})["usage"]["prompt_tokens"]
        for item in (("", [TINY]), ("", [WIDE]))
    )
    assert text < image


def test_content_parts_of_the_openai_client(serving, expected):
    client = openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0)
    _, wanted = expected["gme"]
    parts = [
        {"type": "text", "text": TEXT},
        {"type": "image_url", "image_url": {"url": data_url(WIDE)}},
    ]
    asked = {"messages": [{"role": "user", "content": parts}]}
    # vLLM's form: the body has messages and no input.
    fused = client.post("/embeddings", body={"model": "gme", **asked}, cast_to=object)
    np.testing.assert_allclose(fused["data"][0]["embedding"], wanted[5], atol=TOLERANCE)
    for items in ([{"content": parts}], [{"role": "user", "content": parts}]):
        answer = client.embeddings.create(model="gme", input=items)
        np.testing.assert_allclose(answer.data[0].embedding, wanted[5], atol=TOLERANCE)
    answer = client.embeddings.create(model="gme", input=parts)
    np.testing.assert_allclose([row.embedding for row in answer.data], wanted[:2], atol=TOLERANCE)
    answer = client.embeddings.create(
        model="gme", input=openai.NOT_GIVEN, extra_body={**asked, "encoding_format": "float"}
    )
    np.testing.assert_allclose(answer.data[0].embedding, wanted[5], atol=TOLERANCE)


def test_a_system_message_is_the_instruction(serving, gme):
    messages = [
        {"role": "system", "content": "Find it."},
        {"role": "user", "content": [{"type": "text", "text": TEXT}]},
    ]
    got = post(serving, {"model": "gme", "messages": messages})["data"][0]["embedding"]
    np.testing.assert_allclose(got, gme([(TEXT, [])], "Find it.")[0], atol=TOLERANCE)


@pytest.mark.parametrize("model", ["clip", "gme"])
@pytest.mark.parametrize("client", ["cohere_v2", "cohere_v1", "infinity"])
def test_clients_of_other_makers(serving, client, model):
    texts, images = [TEXT, "x"], [WIDE, TALL]
    got = ask(
        "embed_clients",
        client=client,
        url=serving.url,
        model=model,
        texts=texts,
        images=list(map(data_url, images)),
    )
    wanted = {
        "texts": embed(serving, model, [(text, []) for text in texts]),
        "images": embed(serving, model, [("", [image]) for image in images]),
    }
    if "inputs" in got:
        wanted["inputs"] = embed(serving, model, list(zip(texts, map(list, zip(images)), strict=True)))
    assert set(got) == set(wanted)
    for name, vectors in got.items():
        exact = wanted[name]
        np.testing.assert_allclose(vectors["float"], exact, atol=TOLERANCE)
        if vectors.get("int8"):
            own = np.array(vectors["int8"], float)
            cosines = (own * exact).sum(1) / np.linalg.norm(own, axis=1) / np.linalg.norm(exact, axis=1)
            assert cosines.min() > 0.9995
        if vectors.get("ubinary"):
            np.testing.assert_array_equal(vectors["ubinary"], np.packbits(exact > 0, axis=1))
            np.testing.assert_array_equal(vectors["binary"], np.packbits(exact > 0, axis=1).astype(int) - 128)


def test_cohere_s_error(serving):
    message = ask("embed_clients", client="cohere_error", url=serving.url, model="clip", texts=[], images=[])
    assert message.startswith("images[0]: the image cannot be used: its 5 bytes are no image")


def test_bad_images_are_refused_and_harm_nobody(serving, expected):
    whole = encoded(WIDE)
    cases = {
        "truncated": (whole[: len(whole) // 2], "the image cannot be used: it cannot be read"),
        "no image": (b"hello", "its 5 bytes are no image that is read here (JPEG, PNG"),
        "a bomb": (bomb(60000), "it has 60000 x 60000 pixels; at most 50000000 are taken"),
        "a film": (b"\0\0\0\x18ftypmp42\0\0\0\0", "are no image that is read here"),
    }

    async def ask_all():
        good = [{"text": "x", "image": data_url(TALL)}]
        bad = [
            [{"text": "x"}, {"image": "data:image/png;base64," + base64.b64encode(data).decode()}]
            for data, _ in cases.values()
        ]
        requests = [r for pair in zip(bad, [good] * len(bad), strict=True) for r in pair]
        async with openai.AsyncOpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(
                *(client.embeddings.create(model="gme", input=given) for given in requests),
                return_exceptions=True,
            )

    answers = asyncio.run(ask_all())
    for (_, message), refused in zip(cases.values(), answers[::2], strict=True):
        assert isinstance(refused, openai.BadRequestError)
        assert refused.body["message"].startswith("input[1]: the image cannot be used")
        assert message in refused.body["message"]
        assert (refused.body["param"], refused.body["code"]) == ("input", "invalid_image")
    for answer in answers[1::2]:
        np.testing.assert_allclose(answer.data[0].embedding, expected["gme"][1][2], atol=TOLERANCE)


@pytest.mark.parametrize("model", ["clip", "gme"])
def test_odd_images_have_a_right_answer(serving, model):
    """CMYK, 16 bits, turned by EXIF, transparent, animated: as the plain picture that they show."""
    exif = Image.Exif()
    exif[0x0112] = 3
    values = np.asarray(WIDE.convert("L")).astype(np.uint16)
    clear = WIDE.copy()
    clear.putalpha(255)
    frames = [WIDE.convert("P", palette=Image.Palette.ADAPTIVE), TALL.convert("P").resize(WIDE.size)]
    cmyk = encoded(WIDE.convert("CMYK"), "JPEG")
    pairs = [
        (cmyk, Image.open(io.BytesIO(cmyk)).convert("RGB")),
        (encoded(Image.fromarray(values * 257)), WIDE.convert("L").convert("RGB")),
        (encoded(WIDE.rotate(180), exif=exif), WIDE),
        (encoded(clear), WIDE),
        (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), frames[0].convert("RGB")),
    ]
    odd = [{"image": base64.b64encode(data).decode()} for data, _ in pairs]
    got = post(serving, {"model": model, "input": odd})["data"]
    plain = embed(serving, model, [("", [image]) for _, image in pairs])
    np.testing.assert_allclose([row["embedding"] for row in got], plain, atol=TOLERANCE)


def test_similarity_of_captions_and_an_image(serving):
    """Zero-shot: every caption against an image."""
    captions = ["a photo of a value", "a photo of this class"]
    body = {"model": "clip", "left": [{"image": data_url(WIDE)}], "right": captions}
    got = post(serving, body, "/v1/embeddings/similarity")["similarity"]
    image = embed(serving, "clip", [("", [WIDE])])
    texts = embed(serving, "clip", [(caption, []) for caption in captions])
    np.testing.assert_allclose(got, image @ texts.T, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"model": "clip", "input": [{"text": "x", "image": "AAAA"}]},
            "clip embeds a text or an image",
        ),
        ({"model": "gme", "input": [{"text": "a <|image_pad|>"}]}, "input[0]: the text holds <|image_pad|>"),
        ({"model": "gme", "input": [{"image": "images/cat.png"}]}, "input[0].image"),
        ({"model": "gme", "input": [{"video": "x"}]}, "input[0] holds a video"),
        ({"model": "qwen3-vl", "input": [{"image": data_url(LONG)}]}, "has 1 x 4000 pixels"),
    ],
)
def test_refusals_are_told(serving, body, message):
    status, refused = serving.post(body)
    assert status == 400, refused
    assert message in refused["error"]["message"]


def test_a_dead_image_process_is_noticed(seed):
    serving, _ = seed
    assert serving.get("/ready")[0] == 200
    (image,) = [pid for pid, command in serving.descendants().items() if ".image" in command]
    os.kill(image, signal.SIGKILL)
    wait_until(lambda: serving.get("/ready")[0] == 503, "a red /ready", 60)
    for _ in range(20):
        assert len(post(serving, {"input": TEXT})["data"]) == 1, "texts are still answered"
    wait_until(lambda: serving.get("/ready")[0] == 200, "the process to be replaced")
