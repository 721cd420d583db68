"""Two servers behind one gateway, of which one stands still, then dies. Figures are printed (-s)."""

import asyncio
import contextlib
import os
import signal
import time

import httpx
import numpy as np
import pytest

from tests.support.checkpoints import sentence_transformer
from tests.support.load import TEXTS, tell, under_load, until
from tests.support.server import gateway, serve

WAIT_S = 600
pytestmark = pytest.mark.timeout(900)


def requests_of(serving):
    """How many inferences a server has answered."""
    answer = httpx.get(f"http://{serving.http}/v2/models/tiny/stats").json()
    return answer["model_stats"][0]["inference_stats"]["success"]["count"]


def test_one_of_two_servers_stands_still_or_is_killed_and_comes_back(tmp_path):
    checkpoint = sentence_transformer(tmp_path / "tiny", {"pooling_mode": "mean"})
    with (
        serve(tmp_path / "first", checkpoint, "--dtype", "float32") as first,
        serve(tmp_path / "second", checkpoint, "--dtype", "float32") as second,
        gateway(first.grpc, second.grpc) as url,
    ):
        body = {"model": "tiny", "input": TEXTS, "truncate": True}
        answer = httpx.post(f"{url}/v1/embeddings", json=body, timeout=60).json()
        expected = np.array([row["embedding"] for row in answer["data"]])
        asyncio.run(stop_one(url, first, second, expected, signal.SIGSTOP))
        asyncio.run(stop_one(url, first, second, expected, signal.SIGKILL))


async def stop_one(url, first, second, expected, how):
    async with under_load(url, "tiny", expected, clients=6) as load, httpx.AsyncClient(timeout=60) as client:
        await until(lambda: requests_of(first) > 50 and requests_of(second) > 50, "both to be asked")
        (server,) = [pid for pid, line in first.descendants().items() if "bin/tritonserver" in line]
        os.kill(server, how)
        moment = time.monotonic()
        count = len(load.answers)
        await until(lambda: len(load.answers) > count + 200, "answers of the other")
        assert (await client.get(f"{url}/ready")).status_code == 200, "the model answers"

        def is_asked_again():
            with contextlib.suppress(httpx.TransportError, KeyError):
                # Of one that stands still there is no answer to wait for.
                return server not in first.descendants() and requests_of(first) > 50

        await until(is_asked_again, "the first to be asked again", WAIT_S)
        back = time.monotonic() - moment
    tell(
        f"\none of two servers got {how.name}: it was asked again {back:.1f} s later; longest time without "
        f"an answer {load.gap_s(moment):.2f} s, {len(load.answers)} right answers, failures "
        f"{[what for _, what in load.failures]}"
    )
    assert load.failures == []
