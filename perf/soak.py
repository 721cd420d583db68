"""Does anything grow, and is anything wrong, in an hour of mixed requests with faults among them?

    .venv-test/bin/python perf/soak.py
    .venv-test/bin/python perf/soak.py --minutes 10 --fault-every 1

Serves the default model, and tiny ones of random weights of the other kinds. Clients ask one route after the
other, at random but the same each time: short texts and lists, images, wrong requests and texts that are too
long among them. Some of their requests are the same each time, and so must be their answers. A fault every so
many minutes: at first the server is killed, then in turn a stage of one of the tiny models is killed or
halted; the default model's are left alone, to be seen for the whole time.

A fifth of the time warms up. For every process that lived for most of what follows the slope of its own
memory is printed, in MiB an hour, with how far the memory itself went: without files, and without /dev/shm,
of which the server maps a new part with each stage that is replaced. Rows go to perf/results/soak.csv. An
answer that is wrong, unexpected or missing makes it fail; whether a slope is one is for whoever reads it.
"""

import argparse
import asyncio
import collections
import contextlib
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import aiohttp
import memory
import model
import server
from recording import append
from soak_requests import CHECKED, Request, draw, is_right, tiny_models

from tests.support.server import Serving

_SAMPLE_INTERVAL_S = 10.0
_WARM_UP = 0.2
_UNEXPECTED, _WRONG, _NO_ANSWER = " unexpected", "wrong", "no answer"
_BAD = (_WRONG, _NO_ANSWER)
Sample = tuple[float, dict[str, memory.Process]]
"""Minutes since the beginning, and what each process took."""
Tally = collections.Counter[str]
"""How often what came."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    server.add_arguments(parser)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--fault-every", type=float, default=3, metavar="MINUTES", help="0 is never")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models = (server.minilm(stack), *tiny_models(folder))
        serving = stack.enter_context(server.ours(given, *models))
        samples: list[Sample] = []
        tally: Tally = collections.Counter()
        is_over = threading.Event()
        watch = threading.Thread(target=sample, args=(serving, samples, is_over))
        watch.start()
        try:
            asyncio.run(soak(serving, given, tally))
        finally:
            # An hour's numbers are kept, whatever ended it.
            is_over.set()
            watch.join()
            report(samples)
            print("answers:", ", ".join(f"{what}: {count}" for what, count in sorted(tally.items())))
    bad = {
        what: count for what, count in tally.items() if what.startswith(_BAD) or what.endswith(_UNEXPECTED)
    }
    if bad:
        sys.exit(f"error: not every answer was right: {bad}")


def sample(serving: Serving, samples: list[Sample], is_over: threading.Event) -> None:
    """Looks until it is over, and once more. A process that took another's place has its number behind its
    name.
    """
    began = time.monotonic()
    names: dict[int, str] = {}
    lives: collections.Counter[str] = collections.Counter()
    while True:
        found = {}
        for pid, process in memory.processes(serving).items():
            if pid not in names:
                lives[process.name] += 1
                many = lives[process.name]
                names[pid] = process.name if many == 1 else f"{process.name} ({many})"
            found[names[pid]] = process
        samples.append(((time.monotonic() - began) / 60, found))
        if is_over.wait(_SAMPLE_INTERVAL_S):
            return


async def soak(serving: Serving, given: argparse.Namespace, tally: Tally) -> None:
    """Returns when the time is over, or when one of the clients or the faults fails."""
    end = time.monotonic() + 60 * given.minutes
    texts = model.texts()
    timeout = aiohttp.ClientTimeout(600)
    async with aiohttp.ClientSession(serving.url, timeout=timeout) as session, asyncio.TaskGroup() as group:
        right = {}
        for request in CHECKED:
            async with session.post(request.path, json=request.body) as answer:
                answer.raise_for_status()
                right[request.path, request.name] = await answer.json()
        for number in range(given.clients):
            group.create_task(client(session, random.Random(number), texts, right, end, tally))
        if given.fault_every:
            group.create_task(faults(serving, 60 * given.fault_every, end, tally))


async def client(
    session: aiohttp.ClientSession,
    chance: random.Random,
    texts: list[str],
    right: dict[tuple[str, str], object],
    end: float,
    tally: Tally,
) -> None:
    """Sends its next request when the last is answered."""
    while time.monotonic() < end:
        request: Request = draw(chance, texts)
        try:
            async with session.post(request.path, json=request.body) as answer:
                found = await answer.json()
                expected = request.statuses
                tally[
                    f"{answer.status}" if answer.status in expected else f"{answer.status}{_UNEXPECTED}"
                ] += 1
                key = (request.path, request.name)
                if answer.status == 200 and key in right and not is_right(found, right[key]):
                    tally[_WRONG] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            tally[f"{_NO_ANSWER} ({type(error).__name__})"] += 1


async def faults(serving: Serving, every_s: float, end: float, tally: Tally) -> None:
    """The server's death first, then those of its stages, or standing still, in turn."""
    chance = random.Random(0)
    number = 0
    while time.monotonic() + 2 * every_s < end:
        await asyncio.sleep(every_s)
        found = await asyncio.to_thread(memory.processes, serving)
        stages = sorted(
            pid
            for pid, process in found.items()
            if "." in process.name and not process.name.startswith(server.NAME)
        )
        how = signal.SIGSTOP if number % 2 else signal.SIGKILL
        victim = chance.choice(stages)
        if number == 0:
            (victim,) = [pid for pid, process in found.items() if process.name == "tritonserver"]
        tally[f"{how.name} of {found[victim].name}"] += 1
        os.kill(victim, how)
        number += 1


def report(samples: list[Sample]) -> None:
    """Prints what grew, and adds to the table."""
    last = samples[-1][0]
    for name in sorted({name for _, found in samples for name in found}):
        points = [
            (minute, found[name].own)
            for minute, found in samples
            if name in found and minute >= _WARM_UP * last
        ]
        if len(points) > 2 and points[-1][0] - points[0][0] > 0.5 * last:
            minutes, sizes = zip(*points, strict=True)
            slope = 60 * statistics.linear_regression(minutes, sizes).slope
            print(f"{name:<32} {slope:>+8.1f} MiB of its own an hour  [{min(sizes)}-{max(sizes)} MiB]")
    rows = [
        [f"{minute:.2f}", name, process.pss, process.rss, process.own]
        for minute, found in samples
        for name, process in sorted(found.items())
    ]
    append("soak.csv", ["minute", "process", "PSS MiB", "RSS MiB", "own MiB"], rows)


if __name__ == "__main__":
    main()
