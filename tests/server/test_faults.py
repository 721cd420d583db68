"""Processes that die or stand still under load, and what clients see of it. Figures are printed (-s)."""

import asyncio
import os
import signal
import time

import httpx
import numpy as np
import pytest

from tests.support import multimodal
from tests.support.load import TEXTS, tell, under_load, until
from tests.support.server import gateway, serve, wait_until
from triton_embeddings import models

# Machines are noisy: what is measured is printed, and these are far above it.
RECOVERY_S = 240
pytestmark = pytest.mark.timeout(900)
NOTICE_S = 20
STAGES = ("tokenizer", "encoder", "dense", "sparse", "colbert", "tokens")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory, kinds):
    """A model with every stage that texts pass, each in a process of its own, and a neighbour."""
    folder = tmp_path_factory.mktemp("faults")
    models.add(folder / "models", str(kinds / "bge-m3"), "m3", {"dtype": "float32", "max_length": 512})
    models.add(folder / "models", str(kinds / "bge-m3"), "tokens", {"dtype": "float32", "task": "tokens"})
    multimodal.clip(folder / "clip")
    models.add(folder / "models", str(folder / "clip"), "clip", {"dtype": "float32"})
    with serve(
        folder / "output",
        "--model-repository",
        folder / "models",
        # Longer than a busy machine takes to load a stage.
        GATEWAY_REPAIR_WAIT_S=str(RECOVERY_S),
    ) as running:
        yield running


def embeddings(serving, model="m3", texts=TEXTS):
    status, body = serving.post({"model": model, "input": texts, "truncate": True})
    assert status == 200, body
    return np.array([row["embedding"] for row in body["data"]])


def stub(serving, entry):
    (pid,) = [
        pid
        for pid, line in serving.descendants().items()
        if "python_backend_stub" in line and f"/{entry}/" in line
    ]
    return pid


async def ready(client, serving, model):
    return (await client.get(f"{serving.url}/ready")).json()["models"][model]["ready"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "halted"])
@pytest.mark.parametrize("stage", ["tokenizer", "encoder", "dense"])
async def test_a_stage_dies_under_load(faulty, stage, how):
    expected = await asyncio.to_thread(embeddings, faulty)
    async with httpx.AsyncClient(timeout=60) as client, under_load(faulty.url, "m3", expected) as load:
        await until(lambda: len(load.answers) > 64, "load")
        pid = stub(faulty, f"m3.{stage}")
        os.kill(pid, how)
        moment = time.monotonic()
        while await ready(client, faulty, "m3"):
            assert time.monotonic() - moment < NOTICE_S
            await asyncio.sleep(0.05)
        noticed = time.monotonic() - moment
        while not await ready(client, faulty, "m3"):
            assert time.monotonic() - moment < RECOVERY_S
            assert await ready(client, faulty, "tokens"), "another model is not touched"
            await asyncio.sleep(0.05)
        back = time.monotonic() - moment
        count = len(load.answers)
        await until(lambda: len(load.answers) > count + 64, "answers after the repair")
    tell(
        f"\n{stage} {how.name}: /ready told it after {noticed:.2f} s and was back after {back:.2f} s, "
        f"longest time without an answer {load.gap_s(moment):.2f} s, {len(load.answers)} right answers, "
        f"failures {[what for _, what in load.failures]}, slowest request {load.slowest_s:.2f} s"
    )
    assert not any(what == "wrong vector" for _, what in load.failures)
    assert not load.failures or how is signal.SIGSTOP
    assert load.slowest_s < RECOVERY_S
    assert stub(faulty, f"m3.{stage}") != pid


@pytest.mark.parametrize(
    ("entry", "how"),
    [
        ("m3.sparse", signal.SIGKILL),
        ("m3.colbert", signal.SIGSTOP),
        ("tokens.tokens", signal.SIGKILL),
        ("tokens.tokens", signal.SIGSTOP),
        ("clip.image", signal.SIGKILL),
        ("clip.image", signal.SIGSTOP),
    ],
)
async def test_every_other_stage_is_replaced_without_being_asked(faulty, entry, how):
    """Nobody asks for it: its pings alone tell."""
    model = entry.split(".")[0]
    async with httpx.AsyncClient(timeout=60) as client:
        os.kill(stub(faulty, entry), how)
        moment = time.monotonic()
        while await ready(client, faulty, model):
            assert time.monotonic() - moment < NOTICE_S
            await asyncio.sleep(0.02)
        noticed = time.monotonic() - moment
        while not await ready(client, faulty, model):
            assert time.monotonic() - moment < RECOVERY_S
            await asyncio.sleep(0.02)
    tell(f"\n{entry} {how.name}: noticed after {noticed:.2f} s, back after {time.monotonic() - moment:.2f} s")
    assert faulty.post({"model": "m3", "input": "a"}, "/v1/embeddings/colbert")[0] == 200


def test_two_gateways_replace_a_stage_once(faulty):
    def loads():
        return faulty.server_log().count("loading: m3.tokenizer:1")

    with gateway(faulty.grpc) as url:
        before = loads()
        pid = stub(faulty, "m3.tokenizer")
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: not is_ready(url) and not is_ready(faulty.url), "both to notice", NOTICE_S)
        wait_until(lambda: is_ready(url) and is_ready(faulty.url), "both to be ready again", RECOVERY_S)
        assert loads() == before + 1
        assert stub(faulty, "m3.tokenizer") != pid


def is_ready(url):
    return httpx.get(f"{url}/ready", timeout=60).status_code == 200


def test_the_exit_code_is_0_after_repairs(faulty):
    """The last test of this server."""
    assert faulty.stop(90) == 0
