"""What bodies may be made of, and take together."""

import asyncio
import json
import time

import httpx
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway import body_shape, byte_budget
from gateway.body_shape import MAX_CONTAINERS, MAX_VALUES, check_shape, measure
from gateway.errors import BodyTooLarge, Unavailable
from gateway.wire import parse
from tests.gateway.conftest import running
from tests.support.fake_inference import KINDS, FakeInference
from tests.support.figures import show
from tests.support.gateway import listening

# Much of what could be taken for a mark.
TEXT = st.text(st.sampled_from('"\\[]{},:an\n\u00e9\u2028\0'), max_size=12)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=40,
)


def slowly(value):
    """Lists and objects, values, and how deep they nest: by a walk."""
    if not isinstance(value, (list, dict)):
        return 0, 0, 0
    parts = [slowly(part) for part in (value.values() if isinstance(value, dict) else value)]
    containers, values, depths = zip(*parts, strict=True) if parts else ((), (), ())
    return 1 + sum(containers), max(1, len(value)) + sum(values), 1 + max(depths, default=0)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(VALUE, st.booleans(), st.booleans())
@example(['\\"[', "\\", '\\\\"{'], True, True)
def test_the_shape_of_bytes_is_that_of_what_they_mean(value, is_ascii, has_spaces):
    separators = (" , ", " : ") if has_spaces else (",", ":")
    body = json.dumps(value, ensure_ascii=is_ascii, separators=separators).encode()
    containers, values, depth = slowly(value)
    for piece in (2**18, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(body_shape, "_PIECE", piece)
            assert list(measure(body))[-1] == (containers, values, depth)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(VALUE)
def test_a_limit_refuses_what_is_over_it_and_nothing_else(value):
    body = orjson.dumps(value)
    containers, values, depth = slowly(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body_shape, "MAX_CONTAINERS", 4)
        patch.setattr(body_shape, "MAX_VALUES", 8)
        patch.setattr(body_shape, "MAX_DEPTH", 3)
        if containers > 4 or values > 8 or depth > 3:
            with pytest.raises(body_shape.BadRequest):
                check_shape(body)
        else:
            check_shape(body)


BOMBS = {
    "lists": (b"[]", f"{MAX_CONTAINERS}"),
    "objects": (b"{}", f"{MAX_CONTAINERS}"),
    "numbers": (b"1", f"{MAX_VALUES}"),
    "texts": (b'"["', f"{MAX_VALUES}"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_body_of_very_many_values_never_becomes_objects(name, monkeypatch):
    part, limit = BOMBS[name]
    body = b'{"input":[' + b",".join([part] * (9 * 2**20 // (len(part) + 1))) + b"]}"
    begun = time.process_time()
    orjson.loads(body)
    parsed_s = time.process_time() - begun
    monkeypatch.setattr(orjson, "loads", lambda _: pytest.fail("it was parsed"))
    begun = time.process_time()
    with pytest.raises(BodyTooLarge, match=f"more than {limit} ") as refused:
        parse(body)
    show(
        f"9 MiB of {name}: refused after {1000 * (time.process_time() - begun):.0f} ms of a processor, "
        f"parsing would have taken {1000 * parsed_s:.0f} ms: {refused.value.message}"
    )


def test_marks_in_texts_count_for_nothing():
    code = 'if (a[0]) { b = {"x": [1, 2]}; } // \\" ' * 1000
    texts = [code] * 60
    assert code.count("{") * 60 > 100_000
    content = parse(orjson.dumps({"input": [*texts, "[" * MAX_CONTAINERS, "," * MAX_VALUES]}))
    assert content["input"][:60] == texts


def test_the_largest_good_request_is_let_in():
    pairs = {"inputs": [["a", "b"]] * 10_000}
    assert parse(orjson.dumps(pairs)) == pairs
    ids = {"input": [[1] * 1000] * 1000}
    assert parse(orjson.dumps(ids)) == ids


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embed", "/v1/rerank", "/v2/embed"])
async def test_the_dialect_says_what_is_too_many(path):
    async with running(FakeInference([KINDS])) as client:
        body = b'{"input":[' + b",".join([b"[]"] * (MAX_CONTAINERS + 1)) + b"]}"
        answer = await client.post(path, content=body)
        shape = (await client.post(path, content=b"{")).json()
    assert answer.status_code == 413
    assert answer.json().keys() == shape.keys()
    assert "more than 200000 lists and objects; send fewer inputs at a time" in answer.text


def test_the_budget_of_bodies():
    budget = byte_budget.bodies(1_000_000)
    with budget.enter(0) as alone:
        alone.add(5_000_000)
        with pytest.raises(Unavailable):
            budget.enter(100_000)
        # A short one is always read.
        with budget.enter(65_536) as short:
            short.add(65_536)
    assert budget.held == 0
    with budget.enter(600_000) as first, budget.enter(600_000) as second:
        first.add(600_000)
        second.add(400_000)
        with pytest.raises(Unavailable, match="take 534464 of 1000000 bytes"):
            second.add(200_000)
        second.close()
        assert budget.held == 600_000 - 65_536
    assert budget.held == 0


async def test_bodies_over_the_budget_are_refused_before_they_are_read():
    with listening(FakeInference([KINDS]), max_body_bytes_total=1_000_000) as gateway:
        budget = gateway.server.config.app.state.body_budget
        rest = asyncio.Event()

        async def slow():
            yield b'{"input": "' + b"a" * 900_000
            await rest.wait()
            yield b'"}'

        async with httpx.AsyncClient(base_url=gateway.url, timeout=60) as client:
            first = asyncio.create_task(client.post("/v1/embeddings", content=slow()))
            while budget.held < 800_000:
                await asyncio.sleep(0.01)
            large = {"input": "b" * 900_000}
            answer = await client.post("/v1/embeddings", json=large)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert "GATEWAY_MAX_BODY_BYTES_TOTAL" in answer.json()["error"]["message"]
            assert answer.json()["error"]["code"] == "too_many_bodies"
            # It was told so although it does not say how long it is.
            answer = await client.post("/embed", content=_pieces(json.dumps({"inputs": "b" * 900_000})))
            assert answer.status_code == 503
            assert (await client.post("/v1/embeddings", json={"input": "a"})).status_code == 200
            rest.set()
            assert (await first).status_code == 200
            assert budget.held == 0
            assert (await client.post("/v1/embeddings", json=large)).status_code == 200


async def _pieces(text):
    for start in range(0, len(text), 100_000):
        yield text[start : start + 100_000].encode()
