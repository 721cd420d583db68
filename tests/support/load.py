"""Clients that ask without end over connections that stay open, and check every answer."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from tests.support.figures import show

TEXTS = [f"text number {i} of this test " * (1 + i % 7) for i in range(16)]
# Longer than any request may take.
_TIMEOUT_S = 300.0


@dataclass
class Load:
    """What came of all requests so far."""

    expected: np.ndarray
    """[n, d]: the right answer of each of TEXTS."""
    other: np.ndarray | None = None
    """The right answers of the weights that replace the first."""
    answers: list[tuple[float, str]] = field(default_factory=list)
    """When each right answer came, as time.monotonic(), and whose it was: old or new."""
    failures: list[tuple[float, str]] = field(default_factory=list)
    """When each other answer came, and what it was."""
    slowest_s: float = 0.0
    latest_s: float = float("-inf")
    """Of the requests with a timeout, how long after that the last one was answered; below 0 is before."""
    expired: int = 0
    """Requests that were told in time that their timeout is over."""
    is_over: bool = False

    def gap_s(self, moment: float) -> float:
        """The longest time without a right answer from a moment on."""
        times = [moment, *(at for at, _ in self.answers if at > moment)]
        return max(b - a for a, b in itertools.pairwise(times))

    def judge(self, vectors: np.ndarray, places: list[int]) -> str:
        """Whose answer it is; wrong where it is nobody's."""
        for name, right in (("old", self.expected), ("new", self.other)):
            if right is not None and np.allclose(vectors, right[places], atol=2e-3):
                return name
        return "wrong vector"


@dataclass(frozen=True)
class Ask:
    """What clients ask, and how they read the answer."""

    route: str = "/v1/embeddings"
    inputs: Sequence[Any] = tuple(TEXTS)
    read: Callable[[Any], np.ndarray] = lambda row: np.array(row["embedding"])
    """One item of the answer -> its numbers, as many for each."""
    timeout_s: float | None = None
    """Of every fourth client's requests."""


async def _client(load: Load, url: str, number: int, model: str, ask: Ask) -> None:
    count = len(ask.inputs)
    places = [number % count, (number * 7 + 3) % count]
    body = {"model": model, "input": [ask.inputs[i] for i in places], "truncate": True}
    timeout_s = ask.timeout_s if number % 4 == 0 else None
    if timeout_s is not None:
        body["timeout"] = timeout_s
    async with httpx.AsyncClient(timeout=_TIMEOUT_S) as client:
        while not load.is_over:
            started = time.monotonic()
            try:
                answer = await client.post(f"{url}{ask.route}", json=body)
                now = time.monotonic()
                if timeout_s is not None:
                    load.latest_s = max(load.latest_s, now - started - timeout_s)
                if answer.status_code == 200:
                    vectors = np.array([ask.read(row) for row in answer.json()["data"]])
                    whose = load.judge(vectors, places)
                    (load.failures if whose == "wrong vector" else load.answers).append((now, whose))
                elif answer.status_code == 504 and timeout_s is not None:
                    load.expired += 1
                    await asyncio.sleep(0.2)
                else:
                    retry = answer.headers.get("retry-after")
                    load.failures.append((now, f"{answer.status_code} retry-after {retry}: {answer.text}"))
                    # A client that is told to come back later does so; the server has other work to do.
                    await asyncio.sleep(0.2)
            except httpx.HTTPError as error:
                load.failures.append((time.monotonic(), repr(error)))
                await asyncio.sleep(0.2)
            load.slowest_s = max(load.slowest_s, time.monotonic() - started)


@contextlib.asynccontextmanager
async def under_load(
    url: str,
    model: str,
    expected: np.ndarray,
    clients: int = 32,
    other: np.ndarray | None = None,
    ask: Ask = Ask(),
) -> AsyncIterator[Load]:
    """So many clients ask until the block ends; then each waits for its last answer."""
    load = Load(expected, other)
    tasks = [asyncio.create_task(_client(load, url, i, model, ask)) for i in range(clients)]
    try:
        await until(lambda: len(load.answers) >= clients, "the first answers under load", 60)
        yield load
    finally:
        load.is_over = True
        await asyncio.gather(*tasks)


async def until(condition, what: str, timeout_s: float = 60) -> None:
    """Waits for a condition while the clients go on."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain for {what}"
        await asyncio.sleep(0.02)


def tell(figures: str) -> None:
    """Shows what was measured."""
    show(figures.strip())
