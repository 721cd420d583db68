"""Losing models and getting them back, without a server; tests/server has the real thing."""

import asyncio
import time

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from backends.contract import N_TOKENS
from gateway.availability import Availability
from gateway.context import RequestContext, enter
from gateway.errors import ModelLost, TimedOut
from gateway.inference import GrpcInference
from tests.support.fake_inference import PIPELINE

DEAD = InferenceServerException("Stub process 'tiny.encoder_0_0' is not healthy.", "StatusCode.INTERNAL")


async def test_who_asks_for_a_lost_model_waits_until_it_is_back():
    availability = Availability(60)
    availability.lose("a", "m", "dead")
    availability.lose("b", "m", "dead")
    waiting = asyncio.create_task(availability.usable("m", ["a", "b"]))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert await availability.usable("other", ["a", "b"]) == ["a", "b"]
    availability.regain("b", "m")
    assert await waiting == ["b"]


async def test_of_a_model_that_stays_away_one_learns_at_once():
    availability = Availability(0.05)
    availability.lose("a", "m", "dead")
    assert await availability.usable("m", ["a"]) == []
    # A later sign of the same loss does not begin the wait anew.
    availability.lose("a", "m", "dead")
    started = availability.loss("a", "m").since
    assert availability.loss("a", "m").last_seen > started + 0.04
    assert await availability.usable("m", ["a"]) == []


async def test_nobody_waits_beyond_a_deadline():
    availability = Availability(60)
    availability.lose("a", "m", "dead")
    assert await availability.usable("m", ["a"], deadline=time.monotonic() + 0.01) == []


class _Answer:
    def as_numpy(self, name):
        return np.array([[3]], np.int32)


class _Client:
    """Stands in for the server: fails as often as it is told to, then answers; or takes in and is silent."""

    def __init__(self, *faults):
        self.faults = list(faults)
        self.asked = 0
        self.is_silent = False

    async def infer(self, model, inputs, **options):
        self.asked += 1
        if self.is_silent:
            await asyncio.Event().wait()
        if self.faults:
            raise self.faults.pop(0)
        return _Answer()

    async def close(self):
        pass


async def ask(inference):
    return await inference.infer(PIPELINE, [b"abc"], [N_TOKENS], {})


def gateway(*clients, wait_s=60.0):
    inference = GrpcInference(
        [f"127.0.0.1:{i + 1}" for i in range(len(clients))], 1, 1000, repair_wait_s=wait_s
    )
    for server, client in zip(inference.servers, clients, strict=True):
        server.client = client
    return inference


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


async def test_a_request_that_met_a_dead_process_is_sent_again_when_the_model_is_back():
    client = _Client(DEAD)
    inference = gateway(client)
    asking = asyncio.create_task(ask(inference))
    await until(lambda: inference.availability.loss("127.0.0.1:1", "tiny"))
    await asyncio.sleep(0.01)
    assert (client.asked, asking.done()) == (1, False), "it waits"
    inference.availability.regain("127.0.0.1:1", "tiny")
    assert (await asking)[N_TOKENS].tolist() == [[3]]
    assert client.asked == 2


async def test_it_is_sent_again_once():
    client = _Client(DEAD, DEAD, DEAD)
    inference = gateway(client)
    asking = asyncio.create_task(ask(inference))
    await until(lambda: client.asked == 1)
    await until(lambda: inference.availability.loss("127.0.0.1:1", "tiny"))
    inference.availability.regain("127.0.0.1:1", "tiny")
    with pytest.raises(ModelLost, match="org/tiny does not answer") as caught:
        await asking
    assert client.asked == 2
    assert caught.value.retry_after_s


async def test_what_a_dead_process_had_taken_in_is_sent_again_too():
    client = _Client()
    client.is_silent = True
    inference = gateway(client)
    asking = asyncio.create_task(ask(inference))
    await until(lambda: client.asked == 1)
    inference.availability.lose("127.0.0.1:1", "tiny", "its process died")
    client.is_silent = False
    await asyncio.sleep(0.01)
    assert not asking.done()
    inference.availability.regain("127.0.0.1:1", "tiny")
    assert (await asking)[N_TOKENS].tolist() == [[3]]


async def test_a_client_that_leaves_is_no_loss():
    client = _Client()
    client.is_silent = True
    inference = gateway(client)
    asking = asyncio.create_task(ask(inference))
    await until(lambda: client.asked == 1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert inference.availability.loss("127.0.0.1:1", "tiny") is None


async def test_a_client_that_leaves_in_the_moment_of_a_loss_has_left():
    client = _Client()
    client.is_silent = True
    inference = gateway(client)
    asking = asyncio.create_task(ask(inference))
    await until(lambda: client.asked == 1)
    inference.availability.lose("127.0.0.1:1", "tiny", "its process died")
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    client.is_silent = False
    inference.availability.regain("127.0.0.1:1", "tiny")
    await asyncio.sleep(0.01)
    assert client.asked == 1, "nothing is sent again for nobody"


async def test_another_server_takes_over_at_once():
    first, second = _Client(DEAD), _Client()
    inference = gateway(first, second)
    assert (await ask(inference))[N_TOKENS].tolist() == [[3]]
    assert (first.asked, second.asked) == (1, 1)
    await ask(inference)
    assert (first.asked, second.asked) == (1, 2), "the first has lost it"
    inference.availability.regain("127.0.0.1:1", "tiny")
    await ask(inference)
    assert (first.asked, second.asked) == (2, 2)


async def test_a_wait_ends_with_the_request_s_deadline():
    inference = gateway(_Client())
    inference.availability.lose("127.0.0.1:1", "tiny", "dead")

    async def hurried():
        context = RequestContext("id")
        context.deadline = time.monotonic() + 0.01
        enter(context)
        await ask(inference)

    with pytest.raises(TimedOut):
        await asyncio.create_task(hurried())
