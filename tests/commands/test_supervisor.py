"""Processes that are started again, with real processes."""

import os
import sys
import time

import pytest

from triton_embeddings import supervisor
from triton_embeddings.errors import CommandError
from triton_embeddings.process import Child, Stop
from triton_embeddings.supervisor import Supervised


@pytest.fixture
def stop(monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return Stop()


def child(code):
    return Child("it", [sys.executable, "-S", "-c", code], os.environ)


def look_until(supervised, condition):
    deadline = time.monotonic() + 60
    while not condition():
        supervised.look()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_child_that_ends_is_started_again(stop, monkeypatch):
    monkeypatch.setattr(supervisor, "_FIRST_BACKOFF_S", 0.01)
    cleared = []
    one = Supervised(
        lambda: child("import time; time.sleep(60)"), stop, lambda c: "it died", lambda: cleared.append(1)
    )
    first = one.child
    first.kill()
    look_until(one, lambda: one.child is not first)
    assert one.child.exit_code is None
    assert cleared == [1]
    one.stop(5)
    assert one.child.exit_code is not None


def test_one_that_ends_again_and_again_is_given_up(stop, monkeypatch):
    monkeypatch.setattr(supervisor, "_FIRST_BACKOFF_S", 0.001)
    started = []

    def start():
        started.append(child("raise SystemExit(3)"))
        return started[-1]

    one = Supervised(start, stop, lambda c: f"it ended with exit code {c.exit_code}")
    with pytest.raises(CommandError, match="exit code 3; it ended 5 times within 60 s"):
        look_until(one, lambda: False)
    assert len(started) == 5
