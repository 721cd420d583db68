"""What the benchmarks share: the checkout's modules, and rows of results with the day and the commit."""

import csv
import datetime
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# The checkout is no installed package, and the scripts use its tests' checkpoints.
sys.path.insert(0, str(ROOT))


def append(name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Adds rows to perf/results/NAME, with the day and the commit before them."""
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    file = ROOT / "perf" / "results" / name
    is_new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.writer(stream)
        if is_new:
            writer.writerow(["date", "commit", *header])
        for row in rows:
            writer.writerow([datetime.date.today().isoformat(), commit, *row])


def append_rates(name: str, unit: str, rates: Mapping[str, Sequence[float]], digits: int = 0) -> None:
    """Prints and keeps the median and the spread of every load's rounds, in `unit` a second."""
    rows = []
    for load, values in rates.items():
        middle, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
        print(f"{load:<32} {middle:>8} {unit}/s  [{low}-{high}]")
        rows.append([load, middle, low, high, len(values)])
    append(name, ["load", f"{unit}/s", "min", "max", "rounds"], rows)
