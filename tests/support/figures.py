"""Says what a test has measured, for the person who reads its output (pytest -s)."""

import sys


def show(text: str) -> None:
    """On a line of its own."""
    sys.stdout.write(f"\n{text}\n")
