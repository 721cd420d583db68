"""Which stages are taken for dead, without a server; tests/server/test_faults.py has the real one."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import subprocess

import pytest

from gateway import stage_watch
from gateway.availability import Availability
from gateway.catalog import Catalog
from gateway.inference_server import Pulse
from gateway.stage_watch import StageWatch
from tests.support.fake_inference import PIPELINE, FakeInference

TINY = dataclasses.replace(PIPELINE, steps=("tiny.tokenizer", "tiny.encoder"))
CLIP = dataclasses.replace(
    PIPELINE, steps=("tiny.tokenizer", "tiny.encoder", "tiny.image"), image_steps=("tiny.image",)
)


class _Server:
    """Answers pings as it is told to, and notes what is loaded anew."""

    address = "elsewhere:1"

    def __init__(self):
        self.pulses = {"tiny.tokenizer": Pulse.ALIVE, "tiny.encoder": Pulse.ALIVE}
        self.answers = 0
        self.successes = 7
        self.encoded = Pulse.ALIVE
        self.asked = 0
        self.is_moving = False
        self.is_waiting = self.is_halted = False
        """Whether pings are not answered."""
        self.loaded = []
        self.state_ = "READY"

    async def ping(self, entry, timeout_s):
        await asyncio.sleep(0.001)
        if self.is_waiting:
            await asyncio.sleep(timeout_s)
        return self.pulses[entry]

    async def is_live(self):
        return not self.is_halted

    async def answer_count(self, entry):
        self.answers += self.is_moving
        return self.answers

    async def is_loaded(self, entry):
        return True

    async def state(self, entry):
        return self.state_

    async def success_count(self, entries):
        self.successes += self.is_moving
        return self.successes

    async def encode(self, entry, timeout_s):
        await asyncio.sleep(0.001)
        self.asked += 1
        return self.encoded

    async def unload(self, entry):
        self.loaded.append(f"-{entry}")

    async def load(self, entry):
        self.loaded.append(entry)
        self.pulses[entry] = self.encoded = Pulse.ALIVE


@pytest.fixture
async def server():
    return _Server()


@contextlib.asynccontextmanager
async def watching(server, patience_s=60.0, known=(TINY,), hang_timeout_s=0.01):
    inference = FakeInference(known)
    catalog = Catalog(inference)
    await catalog.refresh()
    availability = Availability(60)
    watch = StageWatch(
        [server],
        catalog,
        availability,
        interval_s=0.005,
        hang_timeout_s=hang_timeout_s,
        patience_s=patience_s,
    )
    task = asyncio.create_task(watch.run())
    try:
        yield watch, availability, inference
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("pulse", [Pulse.DEAD, Pulse.SILENT, Pulse.UNWELL])
async def test_a_dead_or_hung_encoder_is_loaded_anew_and_the_model_comes_back(server, pulse):
    async with watching(server) as (watch, availability, _):
        lost = []
        availability.on_loss.append(lambda *what: lost.append(what))
        server.pulses["tiny.encoder"] = pulse
        await until(lambda: server.loaded == ["-tiny.encoder", "tiny.encoder"])
        assert lost[0] == ("elsewhere:1", "tiny", True)
        await until(lambda: watch.fault(TINY) is None)
        assert server.loaded == ["-tiny.encoder", "tiny.encoder"], "once"


@pytest.fixture
def process(monkeypatch):
    """A process that is taken for the encoder's."""
    with subprocess.Popen(["sleep", "300"]) as one:
        found = {"tiny.encoder": [one.pid]}
        monkeypatch.setattr(stage_watch, "find_stubs", lambda address, entry: found.get(entry, []))
        yield one
        one.kill()


async def test_a_process_that_is_stopped_is_not_waited_for(server, process):
    async with watching(server, hang_timeout_s=60) as (watch, _, _):
        await until(lambda: any(one.processes for one in watch._watched.values()))
        server.is_waiting = True
        os.kill(process.pid, signal.SIGSTOP)
        await until(lambda: server.loaded == ["-tiny.encoder", "tiny.encoder"])


async def test_a_process_that_is_stopped_with_its_server_is_not_to_blame(server, process):
    async with watching(server, hang_timeout_s=0.6) as (watch, _, _):
        await until(lambda: any(one.processes for one in watch._watched.values()))
        server.is_waiting = server.is_halted = True
        server.pulses = dict.fromkeys(server.pulses, Pulse.HALTED)
        os.kill(process.pid, signal.SIGSTOP)
        await until(lambda: watch.fault(TINY) == Pulse.HALTED)
        assert server.loaded == []


async def test_a_process_that_is_stopped_for_moments_is_waited_for(server, process):
    async with watching(server, hang_timeout_s=60) as (watch, _, _):
        await until(lambda: any(one.processes for one in watch._watched.values()))
        server.is_waiting = True
        for _ in range(5):
            os.kill(process.pid, signal.SIGSTOP)
            await asyncio.sleep(0.15)
            os.kill(process.pid, signal.SIGCONT)
            await asyncio.sleep(0.15)
        assert (watch.fault(TINY), server.loaded) == (None, [])


async def test_a_stage_that_computes_is_believed_as_long_as_its_answers_become_more(server):
    async with watching(server, patience_s=0.05) as (watch, _, _):
        server.is_moving = True
        server.pulses["tiny.tokenizer"] = Pulse.SILENT
        await asyncio.sleep(0.3)
        assert (watch.fault(TINY), server.loaded) == (None, [])
        server.is_moving = False
        await until(lambda: server.loaded == ["-tiny.tokenizer", "tiny.tokenizer"])


async def test_texts_are_answered_while_the_stage_of_images_is_gone(server):
    server.pulses["tiny.image"] = Pulse.ALIVE
    async with watching(server, known=[CLIP]) as (watch, availability, _):
        server.state_ = "LOADING"
        server.pulses["tiny.image"] = Pulse.MISSING
        await until(lambda: watch.fault(CLIP))
        assert availability.loss("elsewhere:1", "tiny") is None
        assert await availability.usable("tiny", ["elsewhere:1"]) == ["elsewhere:1"]
        assert availability.loss("elsewhere:1", "tiny.multimodal")
        server.pulses["tiny.encoder"] = Pulse.MISSING
        await until(lambda: availability.loss("elsewhere:1", "tiny"))
        server.pulses = dict.fromkeys(server.pulses, Pulse.ALIVE)
        await until(lambda: watch.fault(CLIP) is None)


async def test_what_somebody_loads_is_left_to_them(server):
    async with watching(server) as (watch, _, _):
        server.state_ = "LOADING"
        server.pulses["tiny.encoder"] = Pulse.MISSING
        await until(lambda: watch.fault(TINY))
        await asyncio.sleep(0.05)
        assert server.loaded == []
        server.state_, server.pulses["tiny.encoder"] = "READY", Pulse.ALIVE
        await until(lambda: watch.fault(TINY) is None)


async def test_what_was_unloaded_for_good_is_no_fault(server):
    async with watching(server) as (watch, _, inference):
        inference.known = []
        server.state_ = "UNAVAILABLE"
        server.pulses["tiny.encoder"] = Pulse.MISSING
        await asyncio.sleep(0.05)
        assert (watch.fault(TINY), server.loaded) == (None, [])


@pytest.mark.parametrize("pulse", [Pulse.UNREACHABLE, Pulse.HALTED])
async def test_a_server_that_cannot_be_reached_or_stands_still_is_waited_for(server, pulse):
    async with watching(server) as (watch, _, _):
        server.pulses = dict.fromkeys(server.pulses, pulse)
        await until(lambda: watch.fault(TINY) == pulse)
        assert server.loaded == []
        server.pulses = dict.fromkeys(server.pulses, Pulse.ALIVE)
        await until(lambda: watch.fault(TINY) is None)


@pytest.mark.parametrize("pulse", [Pulse.SILENT, Pulse.UNWELL])
async def test_an_encoder_that_answers_pings_but_computes_nothing_is_loaded_anew(server, pulse):
    async with watching(server, patience_s=0.06) as (watch, _, _):
        server.encoded = pulse
        await until(lambda: server.loaded == ["-tiny.encoder", "tiny.encoder"])
        assert server.asked >= (3 if pulse is Pulse.UNWELL else 1)
        await until(lambda: watch.fault(TINY) is None)


async def test_an_encoder_whose_canary_waits_while_others_are_answered_is_well(server):
    async with watching(server, patience_s=0.06) as (watch, _, _):
        server.encoded = Pulse.SILENT
        server.is_moving = True
        await asyncio.sleep(0.3)
        assert (watch.fault(TINY), server.loaded) == (None, [])


async def test_an_encoder_that_never_answered_right_is_not_loaded_anew_for_its_errors(server):
    server.successes = 0
    async with watching(server, patience_s=0.06) as (_, _, _):
        server.encoded = Pulse.UNWELL
        await until(lambda: server.asked > 9)
        assert server.loaded == []


async def test_a_server_that_died_with_its_stages_is_no_flood_in_the_log(server, caplog):
    async with watching(server) as (watch, _, _):
        server.pulses["tiny.encoder"], server.state_ = Pulse.DEAD, None
        await until(lambda: watch.fault(TINY))
        await asyncio.sleep(0.05)
        assert server.loaded == []
    assert "failed" not in caplog.text
