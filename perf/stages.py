"""Where does the time of one request go, stage by stage?

    .venv-test/bin/python perf/stages.py

Starts the server, sends one request after the other (and once --clients at a time), and divides what a
client waits: the server's own statistics (gRPC) tell what each stage queued, took in, computed and gave
out, what the ensemble took on the whole, and the rest is the gateway, HTTP and JSON, this client included.
Of stages that run once for several requests, each of these waits the whole time. The encoder answers after
the server's call has returned, so what the server tells of it is its taking in only; it computes in what is
left of the ensemble's time. Rows go to perf/results/stages.csv.
"""

import contextlib
from dataclasses import dataclass

import load
import model
import server
import tritonclient.grpc as grpcclient
from load import Load
from recording import append, percentile

from tests.support.server import NO_PINGS

PARTS = ("queue", "compute_input", "compute_infer", "compute_output")


@dataclass(frozen=True)
class Times:
    """Sums of a model so far, in ns."""

    requests: int
    parts: tuple[int, ...]
    """In the order of PARTS."""
    whole: int

    def since(self, before: "Times") -> "Times":
        parts = tuple(a - b for a, b in zip(self.parts, before.parts, strict=True))
        return Times(self.requests - before.requests, parts, self.whole - before.whole)


def statistics(client: grpcclient.InferenceServerClient, name: str) -> dict[str, Times]:
    """By model: the ensemble, and its stages."""
    found = {}
    for one in client.get_inference_statistics().model_stats:
        if one.name == name or one.name.startswith(f"{name}."):
            stats = one.inference_stats
            parts = tuple(getattr(stats, part).ns for part in PARTS)
            found[one.name] = Times(stats.success.count, parts, stats.success.ns)
    return found


def main() -> None:
    parser = load.arguments(__doc__)
    server.add_arguments(parser)
    parser.add_argument("--clients", type=int, default=32, help="of the second load")
    parser.add_argument("--requests", type=int, default=200, help="of each load and round")
    given = parser.parse_args()
    loads = {
        "1 client x 1 text": Load(1, 1, given.requests),
        f"{given.clients} clients x 1 text": Load(given.clients, 1, max(1, given.requests // given.clients)),
        "1 client x 64 texts": Load(1, 64, max(1, given.requests // 16)),
    }
    rows = []
    with contextlib.ExitStack() as stack:
        serving = stack.enter_context(server.ours(given, **NO_PINGS))
        client = stack.enter_context(grpcclient.InferenceServerClient(serving.grpc))
        url = f"{serving.url}/v1/embeddings"
        body = {"model": server.NAME, "truncate": True, "encoding_format": "base64"}
        for case, one in loads.items():
            load.run(url, model.texts(), one, body)  # warms up
            before, waits = statistics(client, server.NAME), []
            for _ in range(given.rounds):
                waits += load.run(url, model.texts(), one, body).latencies
            times = {name: now.since(before[name]) for name, now in statistics(client, server.NAME).items()}
            rows += table(case, times, sum(waits) / len(waits), percentile(waits, 50))
    append("stages.csv", ["case", "where", "ms", "share", *(f"{part} ms" for part in PARTS), "p50 ms"], rows)


def table(case: str, times: dict[str, Times], wait_s: float, p50_s: float) -> list[list[str]]:
    """A row for each stage that ran, for what the ensemble adds, and for the gateway; means of a request."""
    rows = []
    inside = 0.0
    for name, one in times.items():
        # Of a canary's requests, which ask for all outputs, every stage has a few.
        if name != server.NAME and one.requests > times[server.NAME].requests // 2:
            parts = [part / one.requests / 1e6 for part in one.parts]
            inside += sum(parts)
            rows.append((name.removeprefix(f"{server.NAME}."), sum(parts), parts))
    ensemble = times[server.NAME]
    whole = ensemble.whole / ensemble.requests / 1e6
    rows.append(("encoder's turns, between stages", whole - inside, []))
    # A request of many texts may be cut into several; they run at the same time.
    rows.append(("gateway, HTTP, client", 1000 * wait_s - whole, []))
    table = []
    for where, ms, parts in rows:
        share = ms / (1000 * wait_s)
        print(
            f"{case:<20} {where:<32} {ms:8.2f} ms  {share:4.0%}  {' '.join(f'{part:7.2f}' for part in parts)}"
        )
        cells = [f"{part:.3f}" for part in parts] or [""] * len(PARTS)
        table.append([case, where, f"{ms:.3f}", f"{share:.3f}", *cells, f"{1000 * p50_s:.2f}"])
    return table


if __name__ == "__main__":
    main()
