"""Processes that die or stand still under load, and what clients see of it. Figures are printed (-s)."""

import asyncio
import base64
import io
import os
import re
import signal
import time

import httpx
import numpy as np
import pytest

from tests.support import multimodal
from tests.support.checkpoints import classifier, distilbert
from tests.support.load import Ask, tell, under_load, until
from tests.support.server import gateway, serve, wait_until
from triton_embeddings import models

# Machines are noisy: what is measured is printed, and these are far above it.
RECOVERY_S = 240
pytestmark = pytest.mark.timeout(900)
NOTICE_S = 20
# Of the requests that carry one. An answer may come later by what a busy machine takes to schedule.
TIMEOUT_S = 5.0
SLACK_S = 5.0


def folded(weights):
    """Sparse weights as numbers in places that their tokens tell."""
    row = np.zeros(64)
    for token, weight in weights.items():
        row[sum(token.encode()) % 64] += weight
    return row


def picture(seed):
    file = io.BytesIO()
    multimodal.picture(40, 30, seed).save(file, "PNG")
    return {"image": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}


DENSE = Ask(timeout_s=TIMEOUT_S)
# By stage, what passes it.
ASKS = {
    "m3.tokenizer": DENSE,
    "m3.encoder": DENSE,
    "m3.dense": DENSE,
    "m3.sparse": Ask("/v1/embeddings/sparse", read=lambda row: folded(row["embedding"]), timeout_s=TIMEOUT_S),
    "m3.colbert": Ask(
        "/v1/embeddings/colbert", read=lambda row: np.mean(row["embedding"], axis=0), timeout_s=TIMEOUT_S
    ),
    "topics.logits": Ask("/v1/classify", read=lambda row: np.array(row["probs"]), timeout_s=TIMEOUT_S),
    "clip.image": Ask(inputs=[picture(seed) for seed in range(8)], timeout_s=TIMEOUT_S),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory, kinds):
    """A model with every stage that texts pass, each in a process of its own, and a neighbour."""
    folder = tmp_path_factory.mktemp("faults")
    models.add(folder / "models", str(kinds / "bge-m3"), "m3", {"dtype": "float32", "max_length": 512})
    models.add(folder / "models", str(kinds / "bge-m3"), "tokens", {"dtype": "float32", "task": "tokens"})
    classifier(folder / "topics", distilbert, 3, ("good", "bad", "ugly"))
    models.add(folder / "models", str(folder / "topics"), "topics", {"dtype": "float32"})
    multimodal.clip(folder / "clip")
    models.add(folder / "models", str(folder / "clip"), "clip", {"dtype": "float32"})
    # What requests wait for a repair is the default: on a busy machine some are refused, and are told so.
    with serve(folder / "output", "--model-repository", folder / "models") as running:
        yield running


def right_answers(serving, model, ask):
    body = {"model": model, "input": list(ask.inputs), "truncate": True}
    status, answer = serving.post(body, ask.route)
    assert status == 200, answer
    return np.array([ask.read(row) for row in answer["data"]])


def stub(serving, entry):
    (pid,) = [
        pid
        for pid, line in serving.descendants().items()
        if "python_backend_stub" in line and f"/{entry}/" in line
    ]
    return pid


def server_deaths(serving):
    """Of a lock of its own (2.51) that was held by a process that ended, or by serve, because it kept too
    much of those that had died; serve starts it again.
    """
    aborted = serving.server_log().count("what():  boost::interprocess::lock_exception")
    return aborted + serving.output.read_text().count("that died; killing it")


async def ready(client, serving, model):
    return (await client.get(f"{serving.url}/ready")).json()["models"][model]["ready"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "halted"])
@pytest.mark.parametrize("entry", ASKS)
async def test_a_stage_dies_under_load(faulty, entry, how):
    model, ask = entry.split(".")[0], ASKS[entry]
    expected = await asyncio.to_thread(right_answers, faulty, model, ask)
    async with (
        httpx.AsyncClient(timeout=60) as client,
        under_load(faulty.url, model, expected, ask=ask) as load,
    ):
        await until(lambda: len(load.answers) > 64, "load")
        pid = stub(faulty, entry)
        deaths = server_deaths(faulty)
        is_neighbour_touched = False
        os.kill(pid, how)
        moment = time.monotonic()
        while await ready(client, faulty, model):
            assert time.monotonic() - moment < NOTICE_S
            await asyncio.sleep(0.05)
        noticed = time.monotonic() - moment
        while not await ready(client, faulty, model):
            assert time.monotonic() - moment < RECOVERY_S
            is_neighbour_touched |= not await ready(client, faulty, "tokens")
            await asyncio.sleep(0.05)
        back = time.monotonic() - moment
        count = len(load.answers)
        await until(lambda: len(load.answers) > count + 64, "answers after the repair")
    refused = [what for _, what in load.failures]
    has_server_died = server_deaths(faulty) > deaths
    told = f"{entry} {how.name}" + (", of which the server died" if has_server_died else "")
    tell(
        f"\n{told}: /ready told it after {noticed:.2f} s and was back after {back:.2f} s, "
        f"longest time without an answer {load.gap_s(moment):.2f} s, {len(load.answers)} right answers, "
        f"{len(refused)} refused, {load.expired} past their timeout of {TIMEOUT_S:g} s, the last of these "
        f"{load.latest_s:+.2f} s after it, slowest request {load.slowest_s:.2f} s"
    )
    assert [what for what in refused if not re.match(r"503 retry-after \d+: ", what)] == []
    assert load.latest_s < SLACK_S
    assert load.slowest_s < RECOVERY_S
    assert stub(faulty, entry) != pid
    assert has_server_died or not is_neighbour_touched, "another model is not touched"


@pytest.mark.parametrize(
    ("entry", "how"),
    [
        ("tokens.tokens", signal.SIGKILL),
        ("tokens.tokens", signal.SIGSTOP),
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
        return faulty.server_log().count("loading: m3.dense:1")

    with gateway(faulty.grpc) as url:
        before = loads()
        pid = stub(faulty, "m3.dense")
        os.kill(pid, signal.SIGSTOP)
        # It takes long enough to load: by then the second has met the loss, too.
        wait_until(lambda: not is_ready(url) and not is_ready(faulty.url), "both to notice", NOTICE_S)
        wait_until(lambda: is_ready(url) and is_ready(faulty.url), "both to be ready again", RECOVERY_S)
        assert loads() == before + 1
        assert stub(faulty, "m3.dense") != pid


def is_ready(url):
    return httpx.get(f"{url}/ready", timeout=60).status_code == 200


def test_the_exit_code_is_0_after_repairs(faulty):
    """The last test of this server."""
    assert faulty.stop(90) == 0
