"""What does it save, and what does it cost, to run the heads inside the encoder's process (--fuse-heads)?

    .venv-test/bin/python perf/fused_heads.py
    .venv-test/bin/python perf/fused_heads.py --shape tiny-m3

Starts two servers with the same two models: heads in processes of their own in one, fused in the other. The
same clients go to both in turn. all-MiniLM-L6-v2 has one head; small-m3 has three (random weights), and fused
a request for one of them pays for all, because the server asks a step for every output that the ensemble
maps. Rows go to perf/results/fused_heads.csv.
"""

import argparse
import contextlib
from functools import partial
from typing import Any

import load
import model
import server
import shape
from load import Load, Outcome
from recording import append, in_turn, percentile, spread

HYBRID = ["dense", "sparse", "colbert"]


def cases_of(
    url: str, texts: list[str], loads: list[Load], shaped: str, heads: str
) -> dict[tuple[str, ...], Any]:
    """(model, task, load, where the heads run) -> what runs it."""
    body = {"truncate": True, "encoding_format": "base64"}
    found = {}
    for one in loads:
        size = f"{one.clients} x {one.size} texts"
        for name in (server.NAME, shaped):
            dense = partial(load.run, f"{url}/v1/embeddings", texts, one, {**body, "model": name})
            found[name, "dense", size, heads] = dense
        hybrid = {**body, "model": shaped, "outputs": HYBRID}
        found[shaped, "hybrid", size, heads] = partial(
            load.run, f"{url}/v1/embeddings/hybrid", texts, one, hybrid
        )
    return found


def main() -> None:
    parser = load.arguments(__doc__)
    server.add_arguments(parser)
    parser.add_argument("--shape", default="small-m3", choices=["bge-m3", "small-m3", "tiny-m3"])
    parser.add_argument("--requests", type=int, default=100, help="of one client, with one text")
    parser.add_argument("--texts", type=int, default=64, help="of a large request; two of each of 4 clients")
    given = parser.parse_args()
    loads = [Load(1, 1, given.requests), Load(4, given.texts, 2)]
    # The random vocabulary has few words: these characters are about as many tokens as a paragraph.
    texts = [text[:256] for text in model.texts()]
    path = shape.published(given.shape)
    cases: dict[tuple[str, ...], Any] = {}
    with contextlib.ExitStack() as stack:
        for heads, options in (("own processes", []), ("fused", ["fuse-heads"])):
            how = argparse.Namespace(serve=given.serve, option=[*given.option, *options])
            serving = stack.enter_context(server.ours(how, server.minilm(stack), path))
            cases |= cases_of(serving.url, texts, loads, given.shape, heads)
        report(in_turn({key: cases[key] for key in sorted(cases)}, given.rounds))


def report(results: dict[tuple[str, ...], list[Outcome]]) -> None:
    rows = []
    for (name, task, size, heads), outcomes in results.items():
        waits = [latency for outcome in outcomes for latency in outcome.latencies]
        numbers = [
            *spread([outcome.rate for outcome in outcomes], 1),
            *(f"{1000 * percentile(waits, percent):.1f}" for percent in (50, 95)),
        ]
        rows.append([name, task, size, heads, *numbers, len(outcomes)])
        print(f"{name:<18} {task:<7} {size:<12} {heads:<14} {' '.join(f'{n:>8}' for n in numbers)}")
    header = ["model", "task", "load", "heads", "texts/s", "min", "max", "p50 ms", "p95 ms", "rounds"]
    append("fused_heads.csv", header, rows)


if __name__ == "__main__":
    main()
