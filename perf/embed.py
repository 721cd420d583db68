"""Throughput and latency of a running server's /v1/embeddings, on real paragraphs.

    scripts/serve &
    .venv-test/bin/python perf/embed.py --reference

Three loads: one client with one text (latency), 32 clients with one text each (the dynamic batcher), and
4 clients with 64 texts each (indexing). `--reference` runs sentence-transformers on the same texts in
between, in the same minutes on the same machine: compare within one run only. Rows go to
perf/results/embed.csv. perf/endpoint.py asks more, and starts the servers itself.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import load
import model
import torch
from load import Load, Outcome
from recording import append, in_turn

LOADS = {
    "1 client x 1 text": Load(1, 1, 150),
    "32 clients x 1 text": Load(32, 1, 25),
    "4 clients x 64 texts": Load(4, 64, 4),
}
BODY = {"truncate": True, "encoding_format": "base64"}


def reference(texts: list[str], dtype: torch.dtype) -> Callable[[], Outcome]:
    """sentence-transformers on 256 texts."""
    encoder = model.sentence_transformer(model.MINILM, dtype)

    def run() -> Outcome:
        began = time.perf_counter()
        encoder.encode(texts[:256], batch_size=64)
        return Outcome(time.perf_counter() - began, [], 256)

    return run


def main() -> None:
    parser = load.arguments(__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--reference", action="store_true", help="also time sentence-transformers")
    given = parser.parse_args()
    model.prepare()
    texts = model.texts()
    per_text = sum(map(len, model.tokenize(texts))) / len(texts)
    cases: dict[str, Callable[[], Outcome]] = {
        name: partial(load.run, f"{given.url}/v1/embeddings", texts, one, BODY) for name, one in LOADS.items()
    }
    if given.reference:
        for dtype in model.peer_dtypes():
            name = f"sentence-transformers {str(dtype).removeprefix('torch.')}"
            cases[name] = reference(texts, dtype)
    report(in_turn(cases, given.rounds), per_text)


def report(results: dict[str, list[Outcome]], per_text: float) -> None:
    """Prints medians with their spread, and keeps them."""
    rows = []
    for name, outcomes in results.items():
        rates = [one.rate for one in outcomes]
        middle, low, high = statistics.median(rates), min(rates), max(rates)
        has_requests = bool(outcomes[0].latencies)
        p50, p99 = (
            statistics.median(one.ms(percent) for one in outcomes) if has_requests else 0
            for percent in (50, 99)
        )
        waits = f"   p50 {p50:.1f} ms   p99 {p99:.1f} ms" if has_requests else ""
        print(
            f"{name:32} {middle:7.0f} texts/s [{low:.0f}-{high:.0f}] {middle * per_text:8.0f} tokens/s{waits}"
        )
        numbers = (f"{value:.1f}" for value in (middle, low, high, middle * per_text, p50, p99))
        rows.append([name, len(outcomes), *numbers])
    speeds = ["texts_per_s", "texts_per_s_min", "texts_per_s_max", "tokens_per_s", "p50_ms", "p99_ms"]
    append("embed.csv", ["load", "rounds", *speeds], rows, peers=["sentence-transformers"])


if __name__ == "__main__":
    main()
