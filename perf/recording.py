"""What the benchmarks share: the checkout's modules, and rows of results with the day and the commit."""

import csv
import datetime
import subprocess
import sys
from collections.abc import Iterable, Sequence
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
