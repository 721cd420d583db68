"""The end of a gateway, and of a server, under load. Figures are printed (-s)."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.support.checkpoints import sentence_transformer
from tests.support.load import TEXTS, tell, under_load, until
from tests.support.server import COMMAND, serve, wait_until

WAIT_S = 600
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return sentence_transformer(tmp_path_factory.mktemp("checkpoints") / "tiny", {"pooling_mode": "mean"})


def embeddings(serving, texts=TEXTS):
    status, body = serving.post({"model": "tiny", "input": texts, "truncate": True})
    assert status == 200, body
    return np.array([row["embedding"] for row in body["data"]])


def pid_of(serving, what):
    (pid,) = [pid for pid, line in serving.descendants().items() if what in line]
    return pid


def another_gateway(serving):
    """A second gateway on the same port, of two workers, when it listens."""
    port = serving.url.rsplit(":", 1)[1]
    command = [COMMAND, "gateway", "--server", serving.grpc, "--port", port, "--reuse-port"]
    process = subprocess.Popen(command, cwd="/", env={**os.environ, "GATEWAY_WORKERS": "2"})
    wait_until(
        lambda: sum(listens(serving, pid) for pid in workers_of(process)) == 2, "two workers to listen"
    )
    return process


def workers_of(process):
    """Process ids of what a gateway of several workers has started to listen."""
    found = []
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        # One may end while it is looked at.
        with contextlib.suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


def sockets_of(pid):
    found = []
    with contextlib.suppress(FileNotFoundError):
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{descriptor}")
                if target.startswith("socket:["):
                    found.append(target[8:-1])
    return found


def test_what_dies_is_started_again(tmp_path, checkpoint):
    """The gateway, and then the server under load: nobody but the supervisor does anything."""
    settings = {"GATEWAY_REPAIR_WAIT_S": str(WAIT_S), "GATEWAY_LOG_FORMAT": "json"}
    with serve(tmp_path / "output", checkpoint, "--dtype", "float32", **settings) as serving:
        expected = embeddings(serving)
        gateway = pid_of(serving, "-m gateway")
        os.kill(gateway, signal.SIGKILL)
        begun = time.monotonic()

        def is_ready():
            with contextlib.suppress(OSError):
                return serving.get("/ready")[0] == 200

        wait_until(lambda: pid_of_any(serving, "-m gateway") not in (None, gateway), "a new gateway")
        wait_until(is_ready, "it to be ready")
        tell(f"\na gateway that was killed is ready again after {time.monotonic() - begun:.2f} s")
        asyncio.run(kill_the_server(serving, expected))
        assert serving.stop(90) == 0
    lines = [json.loads(line) for line in serving.output.read_text().splitlines() if line.startswith("{")]
    told = [line["message"] for line in lines if line["logger"] == "triton_embeddings.supervisor"]
    assert [message.split(",")[0] for message in told] == [
        "gateway was killed by SIGKILL",
        "tritonserver was killed by SIGKILL",
    ]


def pid_of_any(serving, what):
    return next((pid for pid, line in serving.descendants().items() if what in line), None)


async def kill_the_server(serving, expected):
    async with under_load(serving.url, "tiny", expected) as load, httpx.AsyncClient(timeout=60) as client:
        os.kill(pid_of(serving, "bin/tritonserver"), signal.SIGKILL)
        moment = time.monotonic()
        while (await client.get(f"{serving.url}/ready")).status_code == 200:
            assert time.monotonic() - moment < 20
            await asyncio.sleep(0.02)
        noticed = time.monotonic() - moment
        assert (await client.get(f"{serving.url}/health")).status_code == 200
        while (await client.get(f"{serving.url}/ready")).status_code != 200:
            assert time.monotonic() - moment < WAIT_S
            await asyncio.sleep(0.05)
        back = time.monotonic() - moment
        count = len(load.answers)
        await until(lambda: len(load.answers) > count + 64, "answers of the new server")
    tell(
        f"\na server that was killed: /ready told it after {noticed:.2f} s, ready again after {back:.2f} s, "
        f"failures {[what for _, what in load.failures]}, slowest request {load.slowest_s:.2f} s"
    )
    assert load.failures == []


def test_a_second_gateway_takes_over_and_the_first_drains(tmp_path, checkpoint):
    with serve(tmp_path / "output", checkpoint, "--dtype", "float32") as serving:
        expected = embeddings(serving)

        async def change():
            async with under_load(serving.url, "tiny", expected) as load:
                first = pid_of(serving, "-m gateway")
                # Nothing here may hold up the clients, which run in the same loop.
                second = await asyncio.to_thread(another_gateway, serving)
                count = len(load.answers)
                await until(lambda: len(load.answers) > count + 100, "load")
                os.kill(first, signal.SIGTERM)
                moment = time.monotonic()
                await until(lambda: not os.path.exists(f"/proc/{first}"), "the first to end", 60)
                ended = time.monotonic() - moment
                count = len(load.answers)
                await until(lambda: len(load.answers) > count + 200, "answers of the second")
                # uvicorn starts another in its place.
                fallen = (await asyncio.to_thread(workers_of, second))[0]
                os.kill(fallen, signal.SIGTERM)
                await asyncio.to_thread(
                    wait_until, lambda: is_whole_again(serving, second, fallen), "another worker"
                )
                count = len(load.answers)
                await until(lambda: len(load.answers) > count + 200, "answers of both workers")
                # The supervisor has started another one; it takes the load over from the second.
                await asyncio.to_thread(
                    wait_until, lambda: listens(serving, pid_of_any(serving, "-m gateway")), "a third"
                )
                second.terminate()
                code = await asyncio.to_thread(second.wait, 60)
                count = len(load.answers)
                await until(lambda: len(load.answers) > count + 200, "answers of the third")
            tell(
                f"\nthe first gateway ended {ended:.2f} s after SIGTERM, {len(load.answers)} right answers, "
                f"failures {[what for _, what in load.failures]}, slowest request {load.slowest_s:.2f} s"
            )
            assert load.failures == []
            assert code == 0

        asyncio.run(change())
        assert serving.stop(90) == 0


def is_whole_again(serving, gateway, fallen):
    workers = workers_of(gateway)
    return fallen not in workers and sum(listens(serving, pid) for pid in workers) == 2


def listens(serving, pid):
    """Whether a process has the gateway's port."""
    port = int(serving.url.rsplit(":", 1)[1])
    listening = {
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].split(":")[1], 16) == port
    }
    return pid is not None and bool(listening & set(sockets_of(pid)))


def test_a_drain_answers_what_is_under_way_and_refuses_the_rest_by_its_deadline(tmp_path, checkpoint):
    """One request that ends in time, and one that does not."""
    with serve(
        tmp_path / "output",
        checkpoint,
        "--max-batch-tokens",
        16,
        "--dtype",
        "float32",
        GATEWAY_DRAIN_TIMEOUT_S="5",
    ) as serving:
        answers = {}

        def send(name, texts):
            answers[name] = post_with_headers(serving, texts)

        senders = [
            # The encoder takes the shortest first.
            threading.Thread(target=send, args=("short", ["a"])),
            threading.Thread(target=send, args=("long", ["a value of this class " * 8] * 1024)),
        ]
        for sender in reversed(senders):
            sender.start()
        connection = httpx.Client()
        assert connection.get(f"{serving.url}/ready").status_code == 200

        def is_running():
            stats = httpx.get(f"http://{serving.http}/v2/models/tiny.tokenizer/stats").json()
            # Texts; pings are two a second.
            return stats["model_stats"][0]["inference_count"] > 300

        wait_until(is_running, "the requests to be under way")
        serving.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        # The connection was open before, and may bring one request more.
        gateway = pid_of(serving, "-m gateway")
        wait_until(lambda: not listens(serving, gateway), "the port to be given up", 20)
        with contextlib.suppress(httpx.TransportError):
            answer = connection.get(f"{serving.url}/ready")
            assert (answer.status_code, answer.json()["reason"]) == (503, "this gateway is stopping")
            assert answer.headers["connection"] == "close"
        for sender in senders:
            sender.join(60)
        assert serving.process.wait(90) == 0
        tell(f"\nthe drain ended after {time.monotonic() - begun:.2f} s; answered {answers}")
    assert answers["short"][0] == 200
    status, headers, body = answers["long"]
    assert status in (200, 503), body
    if status == 503:
        assert int(headers["retry-after"]) >= 1
        assert "the gateway is stopping" in body


def post_with_headers(serving, texts):
    with httpx.Client(timeout=120) as client:
        answer = client.post(
            f"{serving.url}/v1/embeddings", json={"model": "tiny", "input": texts, "truncate": True}
        )
        return answer.status_code, dict(answer.headers), answer.text[:300]
