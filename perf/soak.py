"""Does anything grow? Hours of mixed requests, and the memory of every process all the while.

    .venv-test/bin/python perf/soak.py
    .venv-test/bin/python perf/soak.py --minutes 10 --kill-every 2

Clients ask one route after the other, at random but the same each time: short texts and lists, wrong requests
and texts that are too long among them. --kill-every kills the process of a stage every so many minutes, of a
server that brings it back. A fifth of the time warms up; the slope of what follows is printed for each
process, in MiB an hour, with how far the memory itself went. Rows go to perf/results/soak.csv.
"""

import argparse
import asyncio
import collections
import os
import random
import signal
import statistics
import threading
import time
from typing import Any

import aiohttp
import memory
import model
import server
from recording import append

from tests.support.server import Serving

_SAMPLE_INTERVAL_S = 10.0
_WARM_UP = 0.2
Samples = list[tuple[float, dict[str, tuple[int, int]]]]
"""Minutes since the beginning, and PSS and RSS in MiB by process."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    server.add_arguments(parser)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--kill-every", type=float, default=0, metavar="MINUTES", help="0 is never")
    given = parser.parse_args()
    with server.ours(given) as serving:
        samples: Samples = []
        is_over = threading.Event()
        watch = threading.Thread(target=sample, args=(serving, samples, is_over))
        watch.start()
        try:
            statuses = asyncio.run(soak(serving, given))
        finally:
            is_over.set()
            watch.join()
    print("answers:", ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items())))
    report(samples)


def sample(serving: Serving, samples: Samples, is_over: threading.Event) -> None:
    """Looks until it is over, and once more."""
    began = time.monotonic()
    while True:
        samples.append(((time.monotonic() - began) / 60, memory.sizes(serving)))
        if is_over.wait(_SAMPLE_INTERVAL_S):
            return


async def soak(serving: Serving, given: argparse.Namespace) -> collections.Counter[int]:
    """How often each status came; 0 is a connection that broke."""
    end = time.monotonic() + 60 * given.minutes
    statuses: collections.Counter[int] = collections.Counter()
    texts = model.texts()
    timeout = aiohttp.ClientTimeout(600)
    async with aiohttp.ClientSession(serving.url, timeout=timeout) as session:
        tasks = [client(session, number, texts, end, statuses) for number in range(given.clients)]
        if given.kill_every:
            tasks.append(kill_stages(serving, 60 * given.kill_every, end))
        await asyncio.gather(*tasks)
    return statuses


async def client(
    session: aiohttp.ClientSession,
    number: int,
    texts: list[str],
    end: float,
    statuses: collections.Counter[int],
) -> None:
    """Sends its next request when the last is answered."""
    chance = random.Random(number)
    while time.monotonic() < end:
        path, body = draw(chance, texts)
        try:
            async with session.post(path, json=body) as answer:
                await answer.read()
                statuses[answer.status] += 1
        except aiohttp.ClientError:
            statuses[0] += 1


def draw(chance: random.Random, texts: list[str]) -> tuple[str, dict[str, Any]]:
    """A path and a body."""
    one, some = chance.choice(texts), chance.choices(texts, k=chance.randint(2, 64))
    requests: list[tuple[str, dict[str, Any], int]] = [
        ("/v1/embeddings", {"input": one, "truncate": True}, 6),
        ("/v1/embeddings", {"input": some, "truncate": True, "encoding_format": "base64"}, 4),
        ("/embed", {"inputs": some[:16], "truncate": True}, 2),
        ("/embed_all", {"inputs": one, "truncate": True}, 1),
        ("/tokenize", {"inputs": one}, 2),
        ("/v1/embeddings", {"input": one * 40}, 1),  # too long
        ("/v1/embeddings", {"input": []}, 1),  # wrong
        ("/v1/embeddings", {"input": one, "model": f"nobody-{chance.random()}"}, 1),
    ]
    path, body, _ = chance.choices(requests, [weight for *_, weight in requests])[0]
    return path, body


async def kill_stages(serving: Serving, every_s: float, end: float) -> None:
    """One after the other."""
    chance = random.Random(0)
    while time.monotonic() + every_s < end:
        await asyncio.sleep(every_s)
        stages = [pid for pid, line in serving.descendants().items() if "triton_python_backend_stub" in line]
        os.kill(chance.choice(stages), signal.SIGKILL)


def report(samples: Samples) -> None:
    rows = [
        [f"{minute:.2f}", name, pss, rss]
        for minute, found in samples
        for name, (pss, rss) in sorted(found.items())
    ]
    last = samples[-1][0]
    for name in sorted({name for _, found in samples for name in found}):
        points = [
            (minute, found[name][0])
            for minute, found in samples
            if name in found and minute >= _WARM_UP * last
        ]
        if len(points) > 2:
            minutes, sizes = zip(*points, strict=True)
            slope = 60 * statistics.linear_regression(minutes, sizes).slope
            print(f"{name:<32} {slope:>+8.1f} MiB PSS an hour  [{min(sizes)}-{max(sizes)} MiB]")
    append("soak.csv", ["minute", "process", "PSS MiB", "RSS MiB"], rows)


if __name__ == "__main__":
    main()
