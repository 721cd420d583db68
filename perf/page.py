"""Writes the tables and plots of perf/README.md anew, from the newest run in each CSV of perf/results.

    scripts/setup --perf
    .venv-perf/bin/python perf/page.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, NAME.csv being its file; what a run is,
its rows' date says. PLOTS says which plots there are; they become perf/plots/NAME.svg. What was not
measured yet says so.
"""

import csv
import re
from collections.abc import Callable

import matplotlib as mpl
from recording import COMMON, RESULTS, ROOT

mpl.use("svg")
import matplotlib.pyplot as plt  # after the choice of what draws

PAGE = ROOT / "perf" / "README.md"
FOLDER = ROOT / "perf" / "plots"
Rows = list[dict[str, str]]
# Columns that hold what is said once, above the table.
_SAID = set(COMMON)
# The same file from the same numbers.
mpl.rcParams["svg.hashsalt"] = "perf"


def newest(name: str) -> Rows:
    """The rows of the last run; none where there is no file."""
    file = RESULTS / f"{name}.csv"
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [row for row in rows if all(row[c] == rows[-1][c] for c in COMMON)]


def table(name: str) -> str:
    """The newest run in Markdown, with where and when it was measured."""
    rows = newest(name)
    if not rows:
        return f"Not measured yet: `perf/results/{name}.csv` is missing."
    columns = [column for column in rows[0] if column not in _SAID]
    first = rows[0]
    where = ", ".join(first[c] for c in ("machine", "versions") if first[c]) or "machine not recorded"
    said = f"{first['date']}, commit {first['commit']}; {where}."
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    cells = [[row[column].replace("|", "\\|") for column in columns] for row in rows]
    body = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([said, "", *head, *body])


def bars(name: str, label: str, value: str) -> None:
    """A bar for each row, with its spread."""
    rows = newest(name)[::-1]
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(rows) + 1))
    values = [float(row[value]) for row in rows]
    spread = [
        [v - float(row["min"]) for v, row in zip(values, rows, strict=True)],
        [float(row["max"]) - v for v, row in zip(values, rows, strict=True)],
    ]
    axes.barh([row[label] for row in rows], values, xerr=spread)
    axes.set_xlabel(value)
    save(figure, name)


def lines(name: str, who: str, x: str, value: str, panel: str | None = None) -> None:
    """A line for each `who` over the number in x, in a panel for each value of a column."""
    rows = [row for row in newest(name) if re.search(r"^(length )?\d+$", row[x])]
    panels = list(dict.fromkeys(row[panel] for row in rows)) if panel else [""]
    figure, all_axes = plt.subplots(1, len(panels), figsize=(4 * len(panels) + 2, 4), squeeze=False)
    for axes, here in zip(all_axes[0], panels, strict=True):
        for one in dict.fromkeys(row[who] for row in rows):
            points = [r for r in rows if r[who] == one and (panel is None or r[panel] == here)]
            places = [int(re.sub(r"\D", "", r[x])) for r in points]
            axes.set_xscale("log")
            axes.set_xticks(places, map(str, places))
            axes.minorticks_off()
            axes.plot(places, [float(r[value]) for r in points], "o-", label=one)
        axes.set(xlabel=x, ylabel=value, title=f"{panel}: {here}" if panel else "")
        axes.set_ylim(bottom=0)
    all_axes[0][0].legend()
    save(figure, name)


def over_time(name: str, who: str, x: str, value: str) -> None:
    """A line for each `who`, over the time in x."""
    rows = newest(name)
    figure, axes = plt.subplots(figsize=(8, 4))
    for one in dict.fromkeys(row[who] for row in rows):
        points = [row for row in rows if row[who] == one]
        axes.plot([float(row[x]) for row in points], [float(row[value]) for row in points], label=one)
    axes.set(xlabel=x, ylabel=value)
    axes.set_ylim(bottom=0)
    axes.legend()
    save(figure, name)


def save(figure: plt.Figure, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


PLOTS: dict[str, Callable[[str], None]] = {
    "encoder": lambda name: bars(name, "what", "tokens/s"),
    "endpoint": lambda name: lines(name, "server", "clients", "texts/s", "texts"),
    "length": lambda name: lines(name, "way", "case", "us/token"),
    "hybrid": lambda name: bars(name, "load", "tokens/s"),
    "rerank": lambda name: bars(name, "load", "pairs/s"),
    "soak": lambda name: over_time(name, "process", "minute", "own MiB"),
}


def summary(name: str) -> str:
    """Of a table of hundreds of rows what each process began and ended with."""
    text = table(name)
    rows = newest(name)
    if not rows:
        return text
    said = text.splitlines()[:2]
    head = ["| process | minutes | own MiB at first | least | most | at last |", "|---|---|---|---|---|---|"]
    body = []
    for one in dict.fromkeys(row["process"] for row in rows):
        own = [row for row in rows if row["process"] == one]
        sizes = [int(row["own MiB"]) for row in own]
        ends = f"{sizes[0]} | {min(sizes)} | {max(sizes)} | {sizes[-1]}"
        body.append(f"| {one} | {float(own[-1]['minute']):.0f} | {ends} |")
    return "\n".join([*said, *head, *body])


SUMMARIES = {"soak": summary}


def block(match: re.Match[str]) -> str:
    """What belongs between the marks of one table."""
    name = match[1]
    plot = ""
    if name in PLOTS and newest(name):
        PLOTS[name](name)
        plot = f"\n\n![{name}](plots/{name}.svg)"
    content = SUMMARIES.get(name, table)(name)
    return f"<!-- table: {name} -->\n{content}{plot}\n<!-- end -->"


def main() -> None:
    pattern = r"<!-- table: (\w+) -->\n.*?<!-- end -->"
    text, count = re.subn(pattern, block, PAGE.read_text(), flags=re.S)
    PAGE.write_text(text)
    print(f"{PAGE.relative_to(ROOT)}: {count} tables")


if __name__ == "__main__":
    main()
