"""What it costs that stages tell their times: one model with and without them, one text a request, in turn.

    .venv-test/bin/python perf/observation.py

A request to one and a request to the other take turns, so that both meet the same machine; `difference` is
the median of what a pair differs by, with the bounds that hold it in 95 of 100 runs. Rows go to
perf/results/observation.csv.
"""

import argparse
import http.client
import json
import re
import statistics
import tempfile
import time
from pathlib import Path

from recording import ROOT, append
from server import MINILM

from tests.support.server import serve
from triton_embeddings import models

_WARM_UP = 50


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--checkpoint", default=MINILM)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for entry in ("with", "without"):
            models.add(folder / "models", given.checkpoint, entry, {"dtype": "float32", "task": "embed"})
        forget_times(folder / "models" / "without" / "config.pbtxt")
        command = (ROOT / ".venv" / "bin" / "triton-embeddings", "serve")
        with serve(folder / "output", "--model-repository", folder / "models", command=command) as serving:
            pairs = ask_in_turn(serving.url.removeprefix("http://"), given.pairs)
    differences = sorted(times - without for times, without in pairs)
    # Ranks between which the median is in 95 of 100 samples: the normal approximation of the binomial.
    reach = round(0.98 * len(pairs) ** 0.5)
    middle = len(pairs) // 2
    rows = [
        ["with times", f"{ms(statistics.median(a for a, _ in pairs)):.3f}", "", "", len(pairs)],
        ["without", f"{ms(statistics.median(b for _, b in pairs)):.3f}", "", "", len(pairs)],
        [
            "difference",
            f"{ms(differences[middle]):.3f}",
            f"{ms(differences[middle - reach]):.3f}",
            f"{ms(differences[middle + reach]):.3f}",
            len(pairs),
        ],
    ]
    for row in rows:
        print(*row)
    append("observation.csv", ["case", "p50 ms", "least", "most", "requests"], rows)


def forget_times(config: Path) -> None:
    """Takes the times out of an ensemble, as one written by an earlier version."""
    text = re.sub(r"\noutput \{\n  name: \"\w+_times\"(?:\n  .*)*\n\}", "", config.read_text())
    text = re.sub(
        r"\n    output_map \{\n      key: \"\w+_times\"\n      value: \"\w+_times\"\n    \}", "", text
    )
    assert "_times" not in text
    config.write_text(text)


def ask_in_turn(address: str, count: int) -> list[tuple[float, float]]:
    """Seconds of a request with times, and of one without; which goes first takes turns, too."""
    connection = http.client.HTTPConnection(address)

    def ask(model: str) -> float:
        body = json.dumps({"model": model, "input": "a value of this class"})
        began = time.perf_counter()
        connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200
        return time.perf_counter() - began

    pairs = []
    for number in range(count + _WARM_UP):
        first, second = ("with", "without") if number % 2 else ("without", "with")
        taken = {first: ask(first), second: ask(second)}
        pairs.append((taken["with"], taken["without"]))
    return pairs[_WARM_UP:]


def ms(seconds: float) -> float:
    return 1000 * seconds


if __name__ == "__main__":
    main()
