"""What the benchmarks share: the checkout's modules, rounds that take turns, and rows of results that say
when, at which commit, on which machine and with which versions.
"""

import csv
import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
# PERF_RESULTS is for trials.
RESULTS = Path(os.environ.get("PERF_RESULTS", ROOT / "perf" / "results"))
# What scripts make once and use again; git ignores it.
CACHE = ROOT / "build" / "perf"
Result = TypeVar("Result")
COMMON = ["date", "commit", "machine", "versions"]
"""The first columns of every table."""
# The checkout is no installed package, and the scripts use its tests' checkpoints.
sys.path.insert(0, str(ROOT))


def append(
    name: str,
    header: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    peers: Iterable[str] = (),
    device: str | None = None,
) -> None:
    """Adds rows to the table NAME, of one moment, which is what makes them one run.

    `peers` are packages besides torch and transformers whose versions matter, or whole words with the version
    of something that is installed elsewhere; `device` is a GPU, where not the processor is measured.
    """
    commit = subprocess.check_output(["git", "describe", "--always"], cwd=ROOT, text=True).strip()
    # What is recorded is no change of what was measured: a script may do so more than once.
    changes = ["git", "diff", "--quiet", "HEAD", "--", ".", ":!perf/results"]
    if subprocess.run(changes, cwd=ROOT, check=False).returncode:
        commit += "-dirty"
    when = datetime.datetime.now().isoformat(" ", "seconds")
    common = [when, commit, device or machine(), versions(*peers)]
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / name
    is_new = not file.exists()
    if not is_new:
        with file.open(newline="") as stream:
            found = next(csv.reader(stream))
        if found != [*COMMON, *header]:
            sys.exit(f"error: {file} has the columns {found}, but {[*COMMON, *header]} were measured")
    with file.open("a", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if is_new:
            writer.writerow([*COMMON, *header])
        writer.writerows([*common, *row] for row in rows)


@cache
def machine() -> str:
    """The processor, times the cores that this process may use."""
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{processor[1].strip() if processor else platform.machine()} x {len(os.sched_getaffinity(0))}"


def versions(*peers: str) -> str:
    """`torch 2.13.0, transformers 5.23.0, ...`; what has a blank in it stands as it is."""
    words = [
        peer if " " in peer else f"{peer} {importlib.metadata.version(peer)}"
        for peer in ("torch", "transformers", *peers)
    ]
    return ", ".join(words)


def in_turn(cases: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """What each case gives in each round. They take turns, so that a noisy machine is noisy to all of them;
    one turn before that warms up.
    """
    results: dict[str, list[Result]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, run in cases.items():
            value = run()
            if turn:
                results[name].append(value)
    return results


def spread(values: Sequence[float], digits: int = 0) -> list[str]:
    """Median, least and most."""
    return [f"{f(values):.{digits}f}" for f in (statistics.median, min, max)]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def append_rates(
    name: str,
    unit: str,
    rates: Mapping[str, Sequence[float]],
    digits: int = 0,
    *,
    peers: Iterable[str] = (),
) -> None:
    """Prints and keeps the median and the spread of every load's rounds, in `unit` a second."""
    rows = []
    for load, values in rates.items():
        middle, low, high = spread(values, digits)
        print(f"{load:<40} {middle:>8} {unit}/s  [{low}-{high}]")
        rows.append([load, middle, low, high, len(values)])
    append(name, ["load", f"{unit}/s", "min", "max", "rounds"], rows, peers=peers)
