"""What clients are told under overload and past their time, over HTTP; the server's own client is canned."""

import asyncio
import contextlib
import contextvars
import json
import time

import pytest

from backends.contract import N_TOKENS
from gateway import metrics
from gateway.context import Lane
from gateway.keys import digest_of
from tests.gateway.conftest import running
from tests.support.canned_inference import Answer, Client, canned_inference, until
from tests.support.fake_inference import PIPELINE
from tests.support.figures import show

# A text of 60 bytes has 16 tokens at most, the model's limit; a budget is 64.
TEXT = "x" * 60


@pytest.fixture
async def inference():
    return await canned_inference()


@pytest.fixture
async def client(inference):
    async with running(inference) as made:
        yield made


def lane(inference, which=Lane.INTERACTIVE, name="tiny"):
    return inference.admission.states()[name].lanes[which]


def in_flight(inference, model="org/tiny"):
    return inference.admission.states()[model.removeprefix("org/")].in_flight_tokens


async def fill(client, inference, which, name="tiny", path="/v1/embeddings", **body):
    """Takes all of a lane; the requests that are under way."""
    inference.servers[0].client.release.clear()
    tasks = []
    # The server takes 128 tokens, and urgent requests a few besides.
    for _ in range(40):
        before = inference.admission.states().get(name)
        if before is not None and before.lanes[which].queued_tokens + 32 > (300, 600)[which is Lane.BULK]:
            break
        sent = len(inference.servers[0].client.asked) + (before.lanes[which].queued_requests if before else 0)
        tasks.append(asyncio.create_task(client.post(path, json={**body, "priority": which})))
        await until(
            lambda sent=sent: (
                name in inference.admission.states()
                and len(inference.servers[0].client.asked) + lane(inference, which, name).queued_requests
                > sent
            )
        )
    return tasks


REFUSED = {
    "/v1/embeddings": ({"input": [TEXT] * 2}, 429, lambda body: body["error"]["type"] == "rate_limit_error"),
    "/embed": ({"inputs": [TEXT] * 2}, 429, lambda body: body["error_type"] == "Overloaded"),
    "/v2/embed": ({"texts": [TEXT] * 2}, 429, lambda body: set(body) == {"message"}),
    "/v1/embeddings/dense": ({"input": [TEXT] * 2}, 429, lambda body: body["error_code"] == 409),
}


@pytest.mark.parametrize("path", REFUSED)
@pytest.mark.parametrize("which", list(Lane))
async def test_too_much_is_refused_in_the_dialects_own_words(client, inference, path, which):
    body, status, is_right = REFUSED[path]
    tasks = await fill(client, inference, which, input=[TEXT] * 2)
    asked = len(inference.servers[0].client.asked)
    answer = await client.post(path, json={**body, "priority": which})
    assert answer.status_code == status
    assert is_right(answer.json())
    most = {Lane.INTERACTIVE: 300, Lane.BULK: 600}[which]
    assert f"of {which} requests wait already, at most {most} may" in answer.text
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["retry-after-ms"] == "1000"
    assert answer.headers["x-should-retry"] == "true"
    assert len(inference.servers[0].client.asked) == asked, "nothing of it was sent"
    assert lane(inference, which).rejected == 1
    inference.servers[0].client.release.set()
    assert {(await task).status_code for task in tasks} == {200}
    assert (await client.post(path, json={**body, "priority": which})).status_code == 200


async def test_rerankers_and_classifiers_are_priced_too(client, inference):
    body = {"query": "q", "documents": [TEXT] * 2, "model": "org/reranker"}
    tasks = await fill(client, inference, Lane.INTERACTIVE, "reranker", "/v1/rerank", **body)
    answer = await client.post("/v1/rerank", json=body)
    assert answer.status_code == 429
    assert answer.json()["message"] == answer.json()["detail"] == answer.json()["error"]["message"]
    classes = {"input": TEXT, "model": "org/classifier"}
    other = asyncio.create_task(client.post("/v1/classify", json=classes))
    await until(lambda: "classifier" in inference.admission.states())
    inference.servers[0].client.release.set()
    assert (await other).status_code == 200, "each model has lanes of its own"
    assert {(await task).status_code for task in tasks} == {200}


async def test_the_wait_follows_from_what_was_measured(client, inference):
    await client.post("/v1/embeddings", json={"input": TEXT})
    tasks = await fill(client, inference, Lane.BULK, input=[TEXT] * 2)
    rate = inference.admission.states()["tiny"].tokens_per_s
    queued = lane(inference, Lane.BULK).queued_tokens
    answer = await client.post("/v1/embeddings", json={"input": [TEXT] * 2, "priority": "bulk"})
    assert answer.status_code == 429
    assert int(answer.headers["retry-after-ms"]) == pytest.approx(max(1, queued / rate * 1000), abs=1)
    inference.servers[0].client.release.set()
    await asyncio.gather(*tasks)


async def test_canaries_and_questions_about_tokens_pass_the_queue(client, inference):
    tasks = await fill(client, inference, Lane.INTERACTIVE, input=[TEXT] * 2)
    assert (await client.get("/ready")).status_code == 200
    # Outside of any HTTP request, as the readiness asks.
    outside = contextvars.Context()
    canary = inference.infer(PIPELINE, [b"ready?"], [N_TOKENS], {})
    answer = await asyncio.create_task(canary, context=outside)
    assert answer[N_TOKENS].tolist() == [[1]]
    inference.servers[0].client.release.set()
    await asyncio.gather(*tasks)


LATE = {
    "/v1/embeddings": ({"input": TEXT}, 504, lambda body: body["error"]["message"]),
    "/embed": ({"inputs": TEXT}, 504, lambda body: body["error"]),
    "/v2/embed": ({"texts": [TEXT]}, 504, lambda body: body["message"]),
    "/v1/embeddings/dense": ({"input": TEXT}, 504, lambda body: body["message"]),
    "/v1/rerank": (
        {"query": "q", "documents": ["d"], "model": "org/reranker"},
        504,
        lambda body: body["error"]["message"],
    ),
}


@pytest.mark.parametrize("path", LATE)
async def test_what_is_not_answered_in_time(client, inference, path):
    body, status, message = LATE[path]
    inference.servers[0].client.release.clear()
    answer = await client.post(path, json={**body, "timeout": 0.05})
    assert answer.status_code == status
    name = body.get("model", "org/tiny")
    assert message(answer.json()) == (
        f"{name} did not answer within 0.05 s, its timeout; give it more time, or send fewer or "
        "shorter inputs"
    )
    server = inference.servers[0].client
    assert bool(in_flight(inference, name)) == bool(server.asked), "the server has it, until it says so"
    server.release.set()
    await until(lambda: in_flight(inference, name) == 0)


def durations(which):
    (metric,) = metrics.REQUEST_DURATION.collect()
    counts = [s for s in metric.samples if s.name.endswith("_count") and s.labels["lane"] == which]
    return sum(sample.value for sample in counts)


async def test_a_requests_duration_is_told_by_the_lane_it_waited_in(client):
    for given, taken in (({}, Lane.INTERACTIVE), ({"priority": "bulk"}, Lane.BULK), ({"input": ""}, "none")):
        before = durations(taken)
        await client.post("/v1/embeddings", json={"input": TEXT, **given})
        assert durations(taken) == before + 1, taken
    before = durations(Lane.BULK)
    await client.post("/v1/embeddings", json={"input": [TEXT] * 9})
    assert durations(Lane.BULK) == before + 1, "by its size"


async def test_a_header_and_the_operators_limit(client, inference):
    inference.servers[0].client.release.clear()
    headers = {"x-request-timeout": "0.05"}
    answer = await client.post("/v1/embeddings", json={"input": TEXT, "timeout": 9}, headers=headers)
    assert answer.status_code == 504
    assert "within 0.05 s, its header x-request-timeout; give it" in answer.json()["error"]["message"]
    inference._timeout_s = 0.06
    answer = await client.post("/v1/embeddings", json={"input": TEXT, "timeout": 9})
    assert answer.json()["error"]["message"] == (
        "org/tiny did not answer within 0.06 s; send fewer or shorter inputs (the operator can raise the "
        "limit with GATEWAY_REQUEST_TIMEOUT_S)"
    )


async def test_the_deadline_goes_with_each_server_request(client, inference):
    before = time.time() * 1000
    await client.post("/v1/embeddings", json={"input": TEXT, "timeout": 7})
    (parameters,) = inference.servers[0].client.asked
    assert isinstance(parameters["deadline_ms"], int)
    assert before + 6000 < parameters["deadline_ms"] < time.time() * 1000 + 7001


async def test_what_waits_past_its_deadline_is_never_sent(client, inference):
    tasks = await fill(client, inference, Lane.INTERACTIVE, input=[TEXT] * 2)
    asked = len(inference.servers[0].client.asked)
    tasks.pop().cancel()
    await until(lambda: lane(inference).queued_tokens <= 300 - 32)
    answer = await client.post("/v1/embeddings", json={"input": [TEXT] * 2, "timeout": 0.05})
    assert answer.status_code == 504
    assert len(inference.servers[0].client.asked) == asked
    assert lane(inference).expired == 1
    inference.servers[0].client.release.set()
    await asyncio.gather(*tasks)
    assert lane(inference).queued_tokens == 0


@pytest.mark.parametrize(
    ("fault", "status", "text"),
    [
        (
            ("in ensemble 'a', deadline_exceeded: late", "StatusCode.CANCELLED"),
            504,
            "within 9 s, its timeout",
        ),
        (
            (
                "in ensemble 'a', out_of_memory: the device has no memory for 9 tokens",
                "StatusCode.UNAVAILABLE",
            ),
            503,
            "org/tiny: the device has no memory for 9 tokens",
        ),
    ],
)
async def test_what_the_stages_say(client, inference, fault, status, text):
    inference.servers[0].client.fault = fault
    answer = await client.post("/v1/embeddings", json={"input": TEXT, "timeout": 9})
    assert answer.status_code == status
    assert text in answer.json()["error"]["message"]
    assert answer.headers.get("retry-after") == ("1" if status == 503 else None)


class Stubborn(Client):
    """Computes what it has taken in, as an ensemble does, whether or not anybody waits for the answer."""

    def __init__(self):
        super().__init__()
        self.working = self.most = self.done = 0
        self.tasks = set()

    async def infer(self, model, inputs, *, parameters, **options):
        if "deadline_ms" not in (parameters or {}):
            return Answer(1)
        task = asyncio.create_task(self.work(inputs[0].shape()[0]))
        self.tasks.add(task)
        return await asyncio.shield(task)

    async def work(self, count):
        self.working += count * 16
        self.most = max(self.most, self.working)
        await asyncio.sleep(0.05)
        self.working -= count * 16
        self.done += count * 16
        return Answer(count)


async def test_clients_that_leave_after_a_moment_let_nobody_in(client, inference):
    server = inference.servers[0].client = Stubborn()

    async def impatient(i):
        for _ in range(4):
            asked = client.post("/v1/embeddings", json={"input": [f"{i} {TEXT}"[:60]] * 2})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asked, 0.02)

    started = time.monotonic()
    await asyncio.gather(*(impatient(i) for i in range(60)))
    took = time.monotonic() - started
    show(f"240 clients left within {took:.2f} s; the server had {server.most} tokens at most, of 128 + 32")
    assert server.most <= 160
    assert in_flight(inference) >= server.working
    await asyncio.gather(*server.tasks)
    await until(lambda: in_flight(inference) == 0)
    rate = inference.admission.states()["tiny"].tokens_per_s
    show(f"it has done {server.done} tokens, and is known for {rate:.0f} tokens/s")
    assert rate > 0, "what nobody waits for is work, too"
    assert (await client.post("/v1/embeddings", json={"input": TEXT})).status_code == 200


async def test_calls_that_nobody_waits_for_end_with_the_gateway(inference):
    server = inference.servers[0].client
    server.release.clear()
    async with running(inference) as client:
        answer = await client.post("/v1/embeddings", json={"input": TEXT, "timeout": 0.02})
        assert answer.status_code == 504
        assert server.cancelled == 0
    assert server.cancelled == 1


@pytest.fixture
async def limited(inference, tmp_path):
    """A client whose key has 64 tokens a minute; four texts cost that until they are answered, and then 4."""
    file = tmp_path / "keys.json"
    file.write_text(
        json.dumps([{"name": "a", "sha256": digest_of("a-long-key").hex(), "tokens_per_minute": 64}])
    )
    async with running(inference, api_keys_file=file) as client:
        client.headers["api-key"] = "a-long-key"
        yield client


def refused_requests():
    samples = [sample for metric in metrics.REJECTED_REQUESTS.collect() for sample in metric.samples]
    return sum(sample.value for sample in samples)


async def test_requests_at_one_time_share_what_a_key_has(limited, inference):
    inference.servers[0].client.release.clear()
    before = refused_requests()
    body = {"input": [TEXT] * 2}
    tasks = [asyncio.create_task(limited.post("/v1/embeddings", json=body)) for _ in range(10)]
    await until(lambda: sum(task.done() for task in tasks) == 7)
    inference.servers[0].client.release.set()
    answers = await asyncio.gather(*tasks)
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 7
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert "the key 'a' has used more than its 64 tokens a minute" in refused.json()["error"]["message"]
    assert 0 < int(refused.headers["retry-after-ms"]) <= 32_000
    assert refused_requests() == before + 7
    last = await limited.post("/v1/embeddings", json=body)
    assert 64 - 4 * 2 <= int(last.headers["x-ratelimit-remaining-tokens"]) <= 64


async def test_what_has_no_answer_costs_a_key_what_was_sent(limited, inference):
    inference.servers[0].client.release.clear()
    answer = await limited.post("/v1/embeddings", json={"input": [TEXT] * 20, "timeout": 0.5})
    assert answer.status_code == 504
    assert len(inference.servers[0].client.asked) * 4 * 16 == 128, "the rest was never sent"
    answer = await limited.post("/v1/embeddings", json={"input": TEXT})
    assert answer.status_code == 429
    # 64 tokens are owed, and about one comes back each second.
    assert 50_000 < int(answer.headers["retry-after-ms"]) <= 60_000


async def test_work_with_a_refused_item_costs_a_key_what_was_sent(limited, inference):
    inference.servers[0].client.fault = (
        "in ensemble 'a', invalid_input at item 3: bad",
        "StatusCode.UNKNOWN",
    )
    answer = await limited.post("/v1/embeddings", json={"input": [TEXT] * 4})
    assert answer.status_code == 400
    assert answer.headers["x-ratelimit-remaining-tokens"] == "0"


async def test_both_sides_of_a_comparison_end_together(client, inference):
    """Where one is refused nobody waits for the other."""
    tasks = await fill(client, inference, Lane.BULK, input=[TEXT] * 2)
    before = in_flight(inference)
    body = {"left": ["q"], "right": [TEXT] * 5, "instruct": None, "type": "dense", "priority": "bulk"}
    answer = await client.post("/v1/embeddings/similarity", json=body)
    assert answer.status_code == 429
    assert in_flight(inference) == before
    inference.servers[0].client.release.set()
    await asyncio.gather(*tasks)


async def test_a_request_that_fails_on_this_side_ends_as_a_whole(client, inference):
    inference.servers[0].client.fault = ("in ensemble 'a', internal: broken", "StatusCode.INTERNAL")
    answer = await client.post("/v1/embeddings", json={"input": [TEXT] * 200})
    assert answer.status_code == 500
    assert len(inference.servers[0].client.asked) <= 128 / 16
    await until(lambda: in_flight(inference) == 0)
    assert lane(inference, Lane.BULK).queued_tokens == 0
