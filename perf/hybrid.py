"""What one pass for several heads saves: dense, sparse and ColBERT alone, together, and as three requests.

    .venv-test/bin/python perf/hybrid.py --make random-m3
    scripts/serve random-m3 &
    .venv-test/bin/python perf/hybrid.py

The checkpoint is in BGE-M3's layout with random weights (6 layers of 384), which is as fast as a trained one.
Rounds take turns, so that a noisy machine is noisy to all of them. Rows go to perf/results/hybrid.csv.
"""

import argparse
import asyncio
import time
from pathlib import Path

import aiohttp
from recording import append_rates

from tests.support.checkpoints import bge_m3
from tests.support.sentences import paragraphs

LOADS = {
    "dense": [["dense"]],
    "sparse": [["sparse"]],
    "colbert": [["colbert"]],
    "dense + sparse, one request": [["dense", "sparse"]],
    "all three, one request": [["dense", "sparse", "colbert"]],
    "all three, a request each": [["dense"], ["sparse"], ["colbert"]],
}
CLIENTS = 4


async def run_load(url: str, texts: list[str], requests: list[list[str]], repeats: int) -> tuple[float, int]:
    """Seconds in all, tokens of one kind."""
    tokens = 0

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal tokens
        for _ in range(repeats):
            for outputs in requests:
                body = {"input": texts, "outputs": outputs, "truncate": True, "encoding_format": "base64"}
                async with session.post(f"{url}/v1/embeddings/hybrid", json=body) as answer:
                    answer.raise_for_status()
                    used = (await answer.json())["usage"]["total_tokens"]
            tokens += used

    async with aiohttp.ClientSession() as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
        return time.perf_counter() - began, tokens


async def measure(url: str, rounds: int) -> None:
    texts = [text[:256] for text in paragraphs()[:16]]
    rates: dict[str, list[float]] = {name: [] for name in LOADS}
    for requests in LOADS.values():
        await run_load(url, texts, requests, 1)
    for _ in range(rounds):
        for name, requests in LOADS.items():
            seconds, tokens = await run_load(url, texts, requests, 2)
            rates[name].append(tokens / seconds)
    append_rates("hybrid.csv", "tokens", rates)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:30000")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--make", type=Path, help="write the checkpoint there, and stop")
    arguments = parser.parse_args()
    if arguments.make:
        sizes = {
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
        }
        bge_m3(arguments.make, 8192, **sizes)
    else:
        asyncio.run(measure(arguments.url, arguments.rounds))


if __name__ == "__main__":
    main()
