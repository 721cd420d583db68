"""End to end over HTTP: this project's server beside infinity, at so many clients with so many texts each.

    scripts/setup --perf
    .venv-perf/bin/python perf/endpoint.py

Starts both servers with all-MiniLM-L6-v2 on free ports of this machine (or take --url NAME=URL for those that
run already), and sends both the same real paragraphs, in turn, round by round. The clients share the machine
with the servers. infinity runs BetterTransformer, in float32, and with --infinity-dtype in others. Rows go to
perf/results/endpoint.csv.
"""

import contextlib
import statistics
from functools import partial

import load
import model
import server
from load import Load, Outcome
from recording import append, in_turn, spread


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
        measure(urls, grid(given.clients, given.texts, given.total), body, given.rounds)


def measure(urls: dict[str, str], loads: list[Load], body: dict[str, str | bool], rounds: int) -> None:
    texts = model.texts()
    per_text = sum(map(len, model.tokenize(texts))) / len(texts)
    rows = []
    for one in loads:
        cases = {
            name: partial(load.run, f"{url}/v1/embeddings", texts, one, body) for name, url in urls.items()
        }
        for name, outcomes in in_turn(cases, rounds).items():
            rows.append([name, one.clients, one.size, body["encoding_format"], *row_of(outcomes, per_text)])
            print(f"{name:<24} {one.clients:>4} x {one.size:<3} {' '.join(f'{v:>8}' for v in rows[-1][4:])}")
    rates = ["texts/s", "min", "max", "tokens/s", "p50 ms", "p90 ms", "p99 ms", "rounds"]
    header = ["server", "clients", "texts", "format", *rates]
    append("endpoint.csv", header, rows, peers=[server.infinity_version()])


def row_of(outcomes: list[Outcome], per_text: float) -> list[str]:
    """Texts a second with their spread, tokens a second, percentiles of all rounds' requests."""
    rates = [one.rate for one in outcomes]
    everything = Outcome(1, [latency for one in outcomes for latency in one.latencies], 0)
    waits = [f"{everything.ms(percent):.1f}" for percent in (50, 90, 99)]
    tokens = statistics.median(rates) * per_text
    return [*spread(rates, 1), f"{tokens:.0f}", *waits, str(len(outcomes))]


if __name__ == "__main__":
    main()
