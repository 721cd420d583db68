"""Figures of tests stand in the summary, whatever captures the output."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

TEST = """
from tests.support.figures import show

def test_one():
    show("a figure: 12 ms")
"""


@pytest.mark.parametrize("processes", ["0", "2"])
def test_what_a_test_shows_stands_at_the_end(tmp_path, processes):
    (tmp_path / "conftest.py").write_text("from tests.support.figures import *")
    (tmp_path / "test_one.py").write_text(TEST)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", processes, "--rootdir", tmp_path, tmp_path],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=250,
        check=True,
    )
    summary = done.stdout.partition(" figures ")[2]
    assert "test_one.py::test_one\na figure: 12 ms" in summary
