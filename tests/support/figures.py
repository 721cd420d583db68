"""Says what a test has measured, for the person who reads its output: each figure stands in the summary at
pytest's end, with several processes (pytest -n) too, and at once with pytest -s.
"""

import sys
from collections.abc import Generator

import pytest

_SECTION = "figures"
_shown: list[str] = []


def show(text: str) -> None:
    """On a line of its own."""
    sys.stdout.write(f"\n{text}\n")
    _shown.append(text.strip())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test has shown goes with its report."""
    report = yield
    if _shown:
        report.sections.append((_SECTION, "\n".join(_shown)))
        _shown.clear()
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """All figures of the run, which captured output would hide."""
    told = [
        (report.nodeid, text)
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and (text := _figures_of(report))
    ]
    if told:
        terminalreporter.section("figures")
    for name, text in told:
        terminalreporter.write_line(f"{name}\n{text}")


def _figures_of(report: pytest.TestReport) -> str:
    """What the test has shown; empty where it was nothing."""
    return "\n".join(text for name, text in report.sections if name == _SECTION)
