"""The HTTP endpoint, as NVIDIA's aiperf measures it: throughput and latency of one paragraph a request.

    scripts/setup --perf
    .venv-test/bin/python perf/aiperf.py

Starts the server (or takes --url) and sends it the paragraphs of perf/texts.json at each of --concurrency,
with aiperf from an environment of its own. Rows go to perf/results/aiperf.csv.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import load
import server
from recording import ROOT, append, spread

from backends.source import resolve

COMMAND = ROOT / ".venv-aiperf" / "bin" / "aiperf"
TEXTS = ROOT / "perf" / "texts.json"


def version() -> str:
    """`aiperf 0.13.0`."""
    code = "from importlib.metadata import version; print(version('aiperf'))"
    python = COMMAND.parent / "python"
    return f"aiperf {subprocess.check_output([python, '-c', code], text=True).strip()}"


def measure(url: str, concurrency: int, requests: int) -> dict[str, Any]:
    """What it writes of a run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [entry["text"]["content"][0] for entry in json.loads(TEXTS.read_text())["data"]]
        file = folder / "texts.jsonl"
        file.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
        flags = ["--model", server.NAME, "--url", url, "--endpoint-type", "embeddings"]
        flags += ["--input-file", file, "--custom-dataset-type", "single_turn"]
        flags += ["--tokenizer", resolve(server.MINILM), "--extra-inputs", "truncate:true"]
        flags += ["--concurrency", str(concurrency), "--request-count", str(requests)]
        flags += ["--warmup-request-count", "8", "--artifact-dir", folder / "out", "--ui", "none"]
        done = subprocess.run([COMMAND, "profile", *flags], capture_output=True, text=True, cwd=folder)
        found = list((folder / "out").rglob("profile_export_aiperf.json"))
        if not found:
            sys.exit(f"error: aiperf ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
        result: dict[str, Any] = json.loads(found[0].read_text())
        return result


def main() -> None:
    parser = load.arguments(__doc__, rounds=3)
    server.add_arguments(parser)
    parser.add_argument("--url")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=400, help="of one measurement")
    given = parser.parse_args()
    rows = []
    with contextlib.ExitStack() as stack:
        url = given.url or stack.enter_context(server.ours(given)).url
        for concurrency in given.concurrency:
            found = [measure(url, concurrency, given.requests) for _ in range(given.rounds)]
            rates = [one["request_throughput"]["avg"] for one in found]
            waits = [
                spread([one["request_latency"][name] for one in found], 1)[0]
                for name in ("p50", "p90", "p99")
            ]
            rows.append([concurrency, *spread(rates, 1), *waits, len(found)])
            print(f"at {concurrency:>3}: {' '.join(f'{value:>8}' for value in rows[-1][1:])}")
    header = ["concurrency", "texts/s", "min", "max", "p50 ms", "p90 ms", "p99 ms", "rounds"]
    append("aiperf.csv", header, rows, peers=[version()])


if __name__ == "__main__":
    main()
