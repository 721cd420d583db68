"""Clients of an embeddings endpoint in one process: each sends its next request when the last is answered."""

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from recording import percentile


@dataclass(frozen=True)
class Load:
    """So many clients, and of each so many requests of so many items."""

    clients: int
    size: int
    requests: int


@dataclass(frozen=True)
class Outcome:
    """What a load took."""

    seconds: float
    latencies: Sequence[float]
    """Seconds of each request."""
    items: int

    @property
    def rate(self) -> float:
        """Items a second."""
        return self.items / self.seconds

    def ms(self, percent: float) -> float:
        """A percentile of the latencies."""
        return 1000 * percentile(self.latencies, percent)


async def _run(url: str, items: Sequence[Any], load: Load, body: dict[str, Any], field: str) -> Outcome:
    latencies: list[float] = []

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        for i in range(load.requests):
            start = (number * load.requests + i) * load.size
            batch = [items[(start + k) % len(items)] for k in range(load.size)]
            began = time.perf_counter()
            async with session.post(url, json={**body, field: batch}) as answer:
                content = await answer.read()
                if answer.status != 200:
                    raise SystemExit(f"error: {url} answered {answer.status}: {content[:500]!r}")
            latencies.append(time.perf_counter() - began)

    limits = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=limits, timeout=aiohttp.ClientTimeout(600)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(session, number) for number in range(load.clients)))
        return Outcome(time.perf_counter() - began, latencies, len(latencies) * load.size)


def run(
    url: str, items: Sequence[Any], load: Load, body: dict[str, Any] | None = None, field: str = "input"
) -> Outcome:
    """Sends the items in turn, as `field` of JSON objects that have all of `body` besides.

    Answers are read and not decoded: that is the client's cost, and it shares the machine.
    """
    return asyncio.run(_run(url, items, load, body or {}, field))


def arguments(text: str, rounds: int = 5) -> argparse.ArgumentParser:
    """The flags of every script, with its own first lines as the help."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    return parser
