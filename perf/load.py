"""Clients of an embeddings endpoint in one process: each sends its next request when the last is answered."""

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from recording import percentile

# So many times its own limit a load waits for answers that come too late to count.
_LATE = 4


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
    """Seconds of each request that was answered."""
    items: int
    """Of these requests."""
    failure: str = ""
    """How many requests had no good answer, and why the first of them had none."""

    @property
    def rate(self) -> float:
        """Items a second."""
        return self.items / self.seconds

    def ms(self, percent: float) -> float:
        """A percentile of the latencies."""
        return 1000 * percentile(self.latencies, percent)


async def _run(
    url: str, items: Sequence[Any], load: Load, body: dict[str, Any], field: str, seconds: float
) -> Outcome:
    latencies: list[float] = []
    faults: list[str] = []
    began = time.perf_counter()

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        for i in range(load.requests):
            start = (number * load.requests + i) * load.size
            batch = [items[(start + k) % len(items)] for k in range(load.size)]
            sent = time.perf_counter()
            if sent - began > seconds:
                return
            try:
                async with session.post(url, json={**body, field: batch}) as answer:
                    content = await answer.read()
            except (aiohttp.ClientError, TimeoutError) as error:
                faults.append(str(error) or type(error).__name__)
                return
            if answer.status != 200:
                words = content[:200].decode(errors="replace").split()
                faults.append(" ".join([str(answer.status), *words]))
                return
            latencies.append(time.perf_counter() - sent)

    limits = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=limits, timeout=aiohttp.ClientTimeout(None)) as session:
        clients = [asyncio.create_task(client(session, number)) for number in range(load.clients)]
        done, late = await asyncio.wait(clients, timeout=seconds)
        for one in done:
            one.result()
        took, wanted = time.perf_counter() - began, load.clients * load.requests
        failure = ""
        if len(latencies) < wanted:
            reason = faults[0] if faults else f"no answer in {seconds:g} s"
            failure = f"{wanted - len(latencies)} of {wanted} requests: {reason}"
        outcome = Outcome(took, tuple(latencies), len(latencies) * load.size, failure)
        if late:
            # The server still computes what it has taken in; the next load is not to wait for that.
            late = (await asyncio.wait(late, timeout=_LATE * seconds))[1]
        for one in late:
            one.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return outcome


def attempt(
    url: str,
    items: Sequence[Any],
    load: Load,
    body: dict[str, Any] | None = None,
    field: str = "input",
    seconds: float = 600,
) -> Outcome:
    """Sends the items in turn, as `field` of JSON objects that have all of `body` besides, for so many
    seconds at most: what was not answered by then does not count. A client ends with its first error.

    Answers are read and not decoded: that is the client's cost, and it shares the machine.
    """
    return asyncio.run(_run(url, items, load, body or {}, field, seconds))


def run(
    url: str, items: Sequence[Any], load: Load, body: dict[str, Any] | None = None, field: str = "input"
) -> Outcome:
    """The same where nothing may fail: ends the script otherwise."""
    outcome = attempt(url, items, load, body, field)
    if outcome.failure:
        raise SystemExit(f"error: {url}: {outcome.failure}")
    return outcome


def arguments(text: str, rounds: int = 5) -> argparse.ArgumentParser:
    """The flags of every script, with its own first lines as the help."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    return parser
