"""How much memory does a running server take, process by process: at rest, under load, and after it?

    .venv-test/bin/python perf/memory.py

Starts the server and sends it --clients with 64 texts each for --seconds. PSS counts what several
processes share once, RSS counts it in each; both are of /proc/PID/smaps_rollup, in MiB, under load the
largest of those seen. Rows go to perf/results/memory.csv.
"""

import argparse
import re
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import load
import model
import server
from load import Load
from recording import append

from tests.support.server import Serving


def name_of(command: str) -> str:
    """A stage by its model's name, other processes by their program."""
    words = command.split()
    if "triton_python_backend_stub" in words[0]:
        found = next((word for word in words if "/1/" in word and word.endswith(".py")), "stub")
        return Path(found).parent.parent.name
    module = re.search(r" -m (\w+)", command)
    return module[1] if module else Path(words[0]).name


class Process(NamedTuple):
    """Sizes are in MiB."""

    name: str
    pss: int
    rss: int
    own: int
    """Of no file, and not of /dev/shm, which is mapped anew with each stage that is replaced."""


def processes(serving: Serving) -> dict[int, Process]:
    """By process id."""
    found: dict[int, Process] = {}
    for pid, command in serving.descendants().items():
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        if text:
            sizes = dict(re.findall(r"^(Pss|Rss|Pss_Anon):\s+(\d+)", text, re.M))
            pss, rss, own = (int(sizes[name]) // 1024 for name in ("Pss", "Rss", "Pss_Anon"))
            found[pid] = Process(name_of(command), pss, rss, own)
    return found


def sizes(serving: Serving) -> dict[str, tuple[int, int]]:
    """Name -> PSS and RSS in MiB; several processes of one stage count together."""
    found: dict[str, tuple[int, int]] = {}
    for name, pss, rss, _ in processes(serving).values():
        before = found.get(name, (0, 0))
        found[name] = (before[0] + pss, before[1] + rss)
    return found


def main() -> None:
    parser = load.arguments(__doc__, rounds=1)
    server.add_arguments(parser)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    with server.ours(given) as serving:
        url = f"{serving.url}/v1/embeddings"
        body = {"truncate": True, "encoding_format": "base64"}
        load.run(url, model.texts(), Load(1, 1, 3), body)
        states = {"at rest": sizes(serving), "under load": under_load(serving, url, body, given)}
        time.sleep(5)
        states["after it"] = sizes(serving)
    report(states)


def under_load(
    serving: Serving, url: str, body: dict[str, Any], given: argparse.Namespace
) -> dict[str, tuple[int, int]]:
    """The most that each process took."""
    most: dict[str, tuple[int, int]] = {}
    end = time.monotonic() + given.seconds

    def send() -> None:
        while time.monotonic() < end:
            load.run(url, model.texts(), Load(given.clients, 64, 1), body)

    thread = threading.Thread(target=send)
    thread.start()
    while thread.is_alive():
        for name, (pss, rss) in sizes(serving).items():
            before = most.get(name, (0, 0))
            most[name] = (max(pss, before[0]), max(rss, before[1]))
        thread.join(0.5)
    return most


def report(states: dict[str, dict[str, tuple[int, int]]]) -> None:
    rows = []
    for state, found in states.items():
        total = tuple(map(sum, zip(*found.values(), strict=True)))
        for name, (pss, rss) in {**found, "all": total}.items():
            print(f"{state:<12} {name:<32} {pss:>6} MiB PSS {rss:>6} MiB RSS")
            rows.append([state, name, pss, rss])
    append("memory.csv", ["state", "process", "PSS MiB", "RSS MiB"], rows)


if __name__ == "__main__":
    main()
