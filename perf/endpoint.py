"""End to end over HTTP: this project's server beside infinity, at so many clients with so many texts each.

    scripts/setup --perf
    .venv-perf/bin/python perf/endpoint.py

Starts both servers with all-MiniLM-L6-v2 on free ports of this machine (or take --url NAME=URL for those that
run already), and sends both the same real paragraphs, in turn, round by round. The clients share the machine
with the servers. infinity runs BetterTransformer, in float32, and with --infinity-dtype in others. Before
that one client sends one short text --short times. Rows go to perf/results/endpoint.csv and
perf/results/short_text.csv.

A load is cut off after --seconds. What failed or was not answered by then stands in the column `failures`;
rates and latencies are those of the answered requests, and the load is not repeated.
"""

import contextlib
import statistics
from collections.abc import Callable, Mapping
from functools import partial

import load
import model
import server
from load import Load, Outcome
from recording import append, in_turn, spread

SHORT = "how do I reverse a list"
PERCENTILES = (50, 90, 95, 99)
WAITS = [f"p{percent} ms" for percent in PERCENTILES]


def grid(clients: list[int], sizes: list[int], texts: int) -> list[Load]:
    """Loads of about `texts` texts each, and of one request of each client at least."""
    return [Load(c, s, max(1, texts // (c * s))) for c in clients for s in sizes]


def main() -> None:
    parser = load.arguments(__doc__, rounds=3)
    server.add_arguments(parser)
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--infinity-dtype", action="append", help="Default: float32")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 16, 64], help="of one request")
    parser.add_argument("--total", type=int, default=512, help="texts of a load, about")
    parser.add_argument("--seconds", type=float, default=60, help="of a load, at most")
    parser.add_argument("--short", type=int, default=300, help="requests of one short text; 0 for none")
    parser.add_argument("--base64", action="store_true", help="vectors as base64 and not as numbers")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        urls = dict(pair.split("=", 1) for pair in given.url)
        if not urls:
            urls["triton-embeddings"] = stack.enter_context(server.ours(given)).url
            for dtype in given.infinity_dtype or ["float32"]:
                urls[f"infinity {dtype}"] = stack.enter_context(server.infinity(dtype))
        # infinity always cuts what is too long.
        body: dict[str, str | bool] = {"model": server.NAME, "truncate": True}
        body["encoding_format"] = "base64" if given.base64 else "float"
        if given.short:
            measure_short(urls, body, given.short, given.rounds)
        loads = grid(given.clients, given.texts, given.total)
        measure(urls, loads, body, given.rounds, given.seconds)


def measure_short(urls: dict[str, str], body: dict[str, str | bool], requests: int, rounds: int) -> None:
    """How long one client waits for one short text: percentiles of all rounds' requests."""
    (tokens,) = map(len, model.tokenize([SHORT]))
    one = Load(1, 1, requests)
    cases = {
        name: partial(load.run, f"{url}/v1/embeddings", [SHORT], one, body) for name, url in urls.items()
    }
    rows = []
    for name, outcomes in in_turn(cases, rounds).items():
        waits = latencies(outcomes)
        rows.append([name, tokens, len(outcomes) * requests, *waits])
        print(f"{name:<24} {tokens} tokens: {' '.join(f'{wait:>8}' for wait in waits)} ms")
    header = ["server", "tokens", "requests", *WAITS]
    append("short_text.csv", header, rows, peers=[server.infinity_version()])


def measure(
    urls: dict[str, str], loads: list[Load], body: dict[str, str | bool], rounds: int, seconds: float
) -> None:
    texts = model.texts()
    per_text = sum(map(len, model.tokenize(texts))) / len(texts)
    rows = []
    for one in loads:
        cases = {
            name: partial(load.attempt, f"{url}/v1/embeddings", texts, one, body, seconds=seconds)
            for name, url in urls.items()
        }
        for name, outcomes in until_one_fails(cases, rounds).items():
            rows.append([name, one.clients, one.size, body["encoding_format"], *row_of(outcomes, per_text)])
            print(f"{name:<24} {one.clients:>4} x {one.size:<3} {' '.join(f'{v:>8}' for v in rows[-1][4:])}")
    rates = ["texts/s", "min", "max", "tokens/s", *WAITS, "rounds", "failures"]
    header = ["server", "clients", "texts", "format", *rates]
    append("endpoint.csv", header, rows, peers=[server.infinity_version()])


def until_one_fails(cases: Mapping[str, Callable[[], Outcome]], rounds: int) -> dict[str, list[Outcome]]:
    """As `in_turn`, but a case that fails is not run again, and where it fails while it warms up that is
    all there is of it.
    """
    results: dict[str, list[Outcome]] = {name: [] for name in cases}
    failed = set()
    for turn in range(rounds + 1):
        for name in [name for name in cases if name not in failed]:
            outcome = cases[name]()
            if outcome.failure:
                failed.add(name)
            if turn or outcome.failure:
                results[name].append(outcome)
    return results


def row_of(outcomes: list[Outcome], per_text: float) -> list[str]:
    """Texts a second with their spread, tokens a second, percentiles of all rounds' requests."""
    rates = [one.rate for one in outcomes]
    tokens = statistics.median(rates) * per_text
    failures = "; ".join(one.failure for one in outcomes if one.failure)
    return [*spread(rates, 1), f"{tokens:.0f}", *latencies(outcomes), str(len(outcomes)), failures]


def latencies(outcomes: list[Outcome]) -> list[str]:
    """PERCENTILES of all rounds' requests in ms; empty where none was answered."""
    everything = Outcome(1, [latency for one in outcomes for latency in one.latencies], 0)
    if not everything.latencies:
        return [""] * len(PERCENTILES)
    return [f"{everything.ms(percent):.1f}" for percent in PERCENTILES]


if __name__ == "__main__":
    main()
