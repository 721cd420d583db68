import asyncio
import base64
import dataclasses
import re

import numpy as np
import openai
import pytest

from backends.contract import ErrorCode
from gateway.app import create_app
from gateway.errors import RefusedItem, ServerFault, TimedOut, Unavailable
from gateway.settings import Settings
from tests.gateway.conftest import running
from tests.support.fake_inference import PIPELINE, FakeInference, vector


async def post(client, body, path="/v1/embeddings"):
    if isinstance(body, dict):
        return await client.post(path, json=body)
    return await client.post(path, content=body)


def error_of(response):
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in body["error"]["message"]
    return body["error"]


@pytest.fixture
def sdk(client):
    return openai.AsyncOpenAI(api_key="none", base_url="http://gateway/v1", http_client=client, max_retries=0)


async def test_one_text(client):
    body = (await post(client, {"model": "org/tiny", "input": "hello"})).json()
    assert body["object"] == "list"
    assert body["model"] == "org/tiny"
    assert body["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    (item,) = body["data"]
    assert (item["object"], item["index"]) == ("embedding", 0)
    np.testing.assert_allclose(item["embedding"], vector(b"hello"), rtol=1e-6)
    assert "truncated" not in item


async def test_the_official_client_floats_and_base64(sdk):
    texts = ["a", "bb", "ccc"]
    for encoding in (openai.NOT_GIVEN, "float"):
        answer = await sdk.embeddings.create(model="org/tiny", input=texts, encoding_format=encoding)
        assert [item.index for item in answer.data] == [0, 1, 2]
        for text, item in zip(texts, answer.data, strict=True):
            np.testing.assert_allclose(item.embedding, vector(text.encode()), rtol=1e-6)
        assert answer.usage.total_tokens == 6


async def test_base64_is_little_endian_float32(client):
    body = (await post(client, {"input": ["a"], "encoding_format": "base64"})).json()
    got = np.frombuffer(base64.b64decode(body["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(got, vector(b"a"))


async def test_only_the_dimensions_that_a_model_lists():
    listed = dataclasses.replace(PIPELINE, matryoshka_dimensions=(2, 4))
    async with running(FakeInference([listed])) as client:
        for size in (2, 4, 8):
            answer = await post(client, {"input": "a", "dimensions": size})
            assert len(answer.json()["data"][0]["embedding"]) == size
        error = error_of(await post(client, {"input": "a", "dimensions": 3}))
    assert (error["message"], error["param"]) == ("dimensions is 3; org/tiny takes one of 2, 4", "dimensions")


async def test_without_v1_without_model_with_nulls_and_unknown_fields(client):
    body = {
        "input": "a",
        "model": None,
        "encoding_format": None,
        "dimensions": None,
        "user": 7,
        "frobnicate": [1],
    }
    answer = await post(client, body, "/embeddings")
    assert answer.status_code == 200
    assert answer.json()["model"] == "org/tiny"


async def test_token_ids(client, inference):
    for given, count in (([1, 2, 3], 1), ([[1, 2], [3]], 2)):
        body = (await post(client, {"input": given})).json()
        assert len(body["data"]) == count
    items, parameters = inference.calls[-1]
    assert [np.frombuffer(item, "<i4").tolist() for item in items] == [[1, 2], [3]]
    assert parameters == {"text_format": "ids"}


async def test_an_item_that_was_cut_says_so(client):
    data = (await post(client, {"input": ["short", "x" * 17], "truncate": True})).json()["data"]
    assert "truncated" not in data[0]
    assert data[1]["truncated"] is True


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({}, {}),
        ({"truncate": True}, {"truncation": "right"}),
        ({"truncate": True, "truncation_side": "left"}, {"truncation": "left"}),
        ({"truncation_side": "left"}, {"truncation": "left"}),
        ({"truncate": False, "truncation_side": "left"}, {"truncation": "error"}),
        ({"prompt_name": "query", "normalize": False}, {"prompt_name": "query", "normalize": False}),
        ({"prompt": "", "dimensions": 4}, {"prompt": "", "dimensions": 4}),
        ({"instruction": "Find it"}, {"instruction": "Find it"}),
        ({"instruction": ""}, {}),
        ({"instruct": "ignored by a model without instructions"}, {}),
    ],
)
async def test_extras_become_request_parameters(client, inference, fields, parameters):
    assert (await post(client, {"input": "a", **fields})).status_code == 200
    assert inference.calls[-1][1] == parameters


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({}, "the field input is missing", "input"),
        ({"input": []}, "input is an empty list", "input"),
        ({"input": ""}, "input[0] is an empty string", "input"),
        ({"input": ["a", "", "b"]}, "input[1] is an empty string", "input"),
        ({"input": ["a", 3]}, "input[1] is a number; after a text or an image, every item must be", "input"),
        ({"input": [[1], "a"]}, "input[1] is a string; items are strings, or lists of token ids", "input"),
        ({"input": [[1], []]}, "input[1] is an empty list", "input"),
        (
            {"input": [1, "a"]},
            "input[1] is a string; after a token id, every item must be one",
            "input",
        ),
        ({"input": [[1.5]]}, "input[0] holds a number that is not whole", "input"),
        (
            b'{"input": [1000000000000000000000000000000]}',
            "input[0] is a number that is not whole, or is huge",
            "input",
        ),
        (
            {"input": [[1] * 20, [1] * 11]},
            "input has 31 token ids; at most 30 can be sent in one request",
            "input",
        ),
        ({"input": "a", "prompt": "x\0y"}, "prompt holds a NUL character", "prompt"),
        ({"input": [True]}, "input[0] is a boolean", "input"),
        ({"input": [-1]}, "-1 is no token id of any model", "input"),
        ({"input": [2**31]}, "check_embedding_ctx_length=False", "input"),
        ({"input": None}, "input is null", "input"),
        ({"input": {"thing": "a"}}, "input[0] is an object that holds thing; texts stand in", "input"),
        ({"input": ["a"] * 11}, "input has 11 items; at most 10", "input"),
        (
            {"input": "a", "dimensions": 0},
            "dimensions is 0: it should be greater than or equal to 1",
            "dimensions",
        ),
        ({"input": "a", "dimensions": 9}, "dimensions is 9; org/tiny takes 1 to 8", "dimensions"),
        ({"input": "a", "dimensions": "4"}, "dimensions is '4': it should be a whole number", "dimensions"),
        (
            {"input": "a", "encoding_format": "hex"},
            "'hex': it should be 'float' or 'base64'",
            "encoding_format",
        ),
        ({"input": "a", "truncate": "yes"}, "truncate is 'yes': it should be a valid boolean", "truncate"),
        ({"input": "a", "truncation_side": "up"}, "'up': it should be 'left' or 'right'", "truncation_side"),
        ({"input": "a", "model": 3}, "model is 3: it should be a valid string", "model"),
        (b"", "the body is empty", None),
        (b"{", "the body is not valid JSON: unexpected end of data: line 1 column 2", None),
        (b"[1]", "the body is a JSON array; a JSON object belongs there", None),
        (b'{"input": "\xff"}', "the body is not valid JSON", None),
        (b'{"input": "\\ud800"}', "the body is not valid JSON", None),
    ],
)
async def test_bad_input(client, body, message, param):
    answer = await post(client, body)
    assert answer.status_code == 400
    error = error_of(answer)
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


async def test_an_unknown_model_lists_the_known_ones(client, sdk):
    with pytest.raises(openai.NotFoundError) as caught:
        await sdk.embeddings.create(model="gpt-5", input="a")
    assert "'gpt-5' does not exist here; there are: org/tiny" in str(caught.value)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_over_the_limit_is_refused(client, is_chunked):
    async def chunks():
        for _ in range(30):
            yield b"x" * 10_000

    answer = await client.post("/v1/embeddings", content=chunks() if is_chunked else b"x" * 100_001)
    assert answer.status_code == 413
    error = error_of(answer)
    assert "larger than 100000 bytes" in error["message"]
    assert error["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("reason", "param", "advice"),
    [
        (ErrorCode.CONTEXT_LENGTH_EXCEEDED, "input", 'Send "truncate": true'),
        (ErrorCode.INVALID_TOKEN_ID, "input", "check_embedding_ctx_length=False"),
        (ErrorCode.UNKNOWN_PROMPT, "prompt_name", ""),
    ],
)
async def test_what_a_stage_refuses(client, inference, reason, param, advice):
    inference.fault = RefusedItem("it is so and so", item=3, reason=reason)
    answer = await post(client, {"input": "a"})
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["message"].startswith("input[3]: it is so and so")
    assert advice in error["message"]
    assert (error["code"], error["param"]) == (reason, param)


@pytest.mark.parametrize(
    ("fault", "status"), [(Unavailable("gone"), 503), (TimedOut("late"), 504), (ServerFault("broken"), 500)]
)
async def test_faults_of_the_server(client, inference, fault, status):
    inference.fault = fault
    answer = await post(client, {"input": "a"})
    assert answer.status_code == status
    assert error_of(answer)["type"] == "server_error"
    assert answer.headers.get("retry-after") == ("1" if status == 503 else None)


async def test_an_unexpected_exception_leaks_nothing(client, inference, caplog):
    async def explode(*_):
        raise ZeroDivisionError("secret")

    await post(client, {"input": "a"})
    inference.infer = explode
    answer = await post(client, {"input": "a"})
    assert answer.status_code == 500
    assert error_of(answer)["type"] == "server_error"
    assert "secret" not in answer.text
    assert "ZeroDivisionError: secret" in caplog.text


async def test_models(client, sdk):
    (model,) = [m async for m in await sdk.models.list()]
    assert (model.id, model.object, model.owned_by) == ("org/tiny", "model", "triton-embeddings")
    assert model.created > 1_700_000_000
    one = await sdk.models.retrieve("org/tiny")
    assert (one.id, one.tasks, one.dimensions, one.max_length) == ("org/tiny", ["embed"], 8, 16)
    with pytest.raises(openai.NotFoundError):
        await sdk.models.retrieve("org/other")


async def test_routes_that_are_not_there(client):
    answer = await client.get("/v1/nothing")
    assert answer.status_code == 404
    assert "GET /v1/nothing does not exist here; /docs lists what does" in error_of(answer)["message"]
    answer = await client.get("/v1/embeddings")
    assert answer.status_code == 405
    assert error_of(answer)["message"] == "GET /v1/embeddings does not exist here, but POST does"
    assert answer.headers["allow"] == "POST"


async def test_what_probes_and_browsers_ask(client):
    assert (await client.head("/health")).status_code == 200
    answer = await client.get("/")
    assert (answer.status_code, answer.headers["location"]) == (307, "/docs")


async def test_docs_show_the_request(client):
    assert (await client.get("/docs")).status_code == 200
    schema = (await client.get("/openapi.json")).json()
    body = schema["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]
    assert {"input", "dimensions", "prompt_name", "truncate"} <= set(body["schema"]["properties"])
    assert (await post(client, body["example"])).status_code == 200, "what the page offers to send"


async def test_docs_need_no_other_machine(client):
    page = (await client.get("/docs")).text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sources
    assert all(source.startswith("/") for source in sources)
    for source in sources:
        assert (await client.get(source)).status_code == 200


async def test_the_limits_are_openai_s_unless_set():
    inference = FakeInference()
    async with running(inference) as client:
        assert (await post(client, {"input": ["a"] * 2048})).status_code == 200
        answer = await post(client, {"input": ["a"] * 2049})
    assert answer.status_code == 400
    assert "at most 2048" in error_of(answer)["message"]


async def test_a_model_for_another_task_says_what_it_serves():
    other = dataclasses.replace(PIPELINE, served_model_name="other", tasks=frozenset({"score"}))
    async with running(FakeInference([other, PIPELINE])) as client:
        answer = await post(client, {"input": "a", "model": "other"})
        assert (await post(client, {"input": "a"})).json()["model"] == "org/tiny", (
            "the first that serves the task"
        )
    assert answer.status_code == 400
    assert error_of(answer)["message"] == (
        "the model other does not serve embed; it serves score; embed is served by org/tiny"
    )


async def test_a_client_that_leaves_while_it_sends_is_no_error(inference, caplog):
    app = create_app(Settings(), inference)
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
    sent = []

    async def receive():
        return next(messages)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": [], "query_string": b""}
    async with app.router.lifespan_context(app):
        await app(scope, receive, send)
    assert sent[0]["status"] == 499
    assert "Traceback" not in caplog.text


async def test_requests_do_not_mix():
    inference = FakeInference()
    async with running(inference) as client:
        answers = await asyncio.gather(
            *(post(client, {"input": [f"text {i}", "x" * i or "y"]}) for i in range(50))
        )
    for i, answer in enumerate(answers):
        np.testing.assert_allclose(
            answer.json()["data"][0]["embedding"], vector(f"text {i}".encode()), rtol=1e-6
        )
