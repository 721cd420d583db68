"""Processes that are started again, with real processes."""

import contextlib
import os
import signal
import sys
import time
from types import SimpleNamespace

import httpx
import pytest

from tests.support.server import free_ports
from triton_embeddings import heartbeat, supervisor
from triton_embeddings.errors import CommandError
from triton_embeddings.process import Child, Stop
from triton_embeddings.supervisor import Supervised


@pytest.fixture
def stop(monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return Stop()


def child(code):
    return Child("it", [sys.executable, "-S", "-c", code], os.environ)


def look_until(look, condition):
    deadline = time.monotonic() + 60
    while not condition():
        look()
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
    look_until(one.look, lambda: one.child is not first)
    assert one.child.exit_code is None
    assert cleared == [1]
    one.stop(5)
    assert one.child.exit_code is not None


def test_a_worn_out_child_is_killed_and_another_takes_its_place(stop, monkeypatch, caplog):
    monkeypatch.setattr(supervisor, "_FIRST_BACKOFF_S", 0.01)
    judged = []

    def worn_out(pid):
        judged.append(pid)
        return "it holds too much" if len(set(judged)) <= 6 else None

    one = Supervised(
        lambda: child("import time; time.sleep(60)"),
        stop,
        lambda c: f"ended with {c.exit_code}",
        worn_out=worn_out,
    )
    look_until(one.look, lambda: len(set(judged)) == 7)
    assert len(judged) == 7, "one that was killed is judged no more"
    assert [record.getMessage() for record in caplog.records] == 6 * [
        "it holds too much; killing it",
        "it was killed; starting it again in 0.01 s",
    ], "and that is no death of those after which it is given up"
    seventh = one.child
    seventh.kill()
    look_until(one.look, lambda: one.child is not seventh)
    assert f"ended with {-signal.SIGKILL}; starting" in caplog.text, "what others kill is explained"
    one.stop(5)


def test_a_worn_out_child_is_no_crash_at_the_start_either(stop, monkeypatch):
    monkeypatch.setattr(supervisor, "_FIRST_BACKOFF_S", 0.01)
    reasons = []
    one = Supervised(
        lambda: child("import time; time.sleep(60)"),
        stop,
        lambda c: "it crashed",
        worn_out=lambda _: reasons.pop() if reasons else None,
    )
    first = one.child
    first.kill()
    look_until(one.look_at_start, lambda: one.child is not first)
    second = one.child
    reasons.append("it holds too much")
    look_until(one.look_at_start, lambda: one.child is not second)
    one.child.kill()
    with pytest.raises(CommandError, match="it crashed"):
        look_until(one.look_at_start, lambda: False)


def test_the_reason_for_which_it_was_killed_is_told_at_the_start_too(stop, monkeypatch):
    monkeypatch.setattr(supervisor, "_FIRST_BACKOFF_S", 0.01)
    silence = SimpleNamespace(has_stopped=True, reset=lambda: None)
    one = Supervised(
        lambda: child("import time; time.sleep(60)"), stop, lambda c: "no memory", heartbeat=silence
    )
    with pytest.raises(CommandError, match=r"^it takes connections but has answered none for 10 s$"):
        look_until(one.look_at_start, lambda: False)


def test_one_that_ends_again_and_again_is_given_up(stop, monkeypatch):
    monkeypatch.setattr(supervisor, "_FIRST_BACKOFF_S", 0.001)
    started = []

    def start():
        started.append(child("raise SystemExit(3)"))
        return started[-1]

    one = Supervised(start, stop, lambda c: f"it ended with exit code {c.exit_code}")
    with pytest.raises(CommandError, match="exit code 3; it ended 5 times within 60 s"):
        look_until(one.look, lambda: False)
    assert len(started) == 5


def test_at_the_start_a_crash_is_tried_again_once_and_an_error_is_not(stop, monkeypatch):
    monkeypatch.setattr(supervisor, "_FIRST_BACKOFF_S", 0.01)

    def starting(*codes):
        started = []

        def start():
            started.append(child(codes[len(started)]))
            return started[-1]

        return Supervised(start, stop, lambda c: f"ended with {c.exit_code}"), started

    crash, error = "import os; os.abort()", "raise SystemExit(1)"
    one, started = starting(crash, "import time; time.sleep(60)")
    look_until(one.look_at_start, lambda: len(started) == 2)
    assert one.child.exit_code is None
    one.stop(5)
    for codes, end in (((error,), 1), ((crash, error), 1), ((crash, crash), -6)):
        one, started = starting(*codes)
        with pytest.raises(CommandError, match=f"^ended with {end}$"):
            look_until(one.look_at_start, lambda: False)
        assert len(started) == len(codes)


def test_one_that_stands_still_is_killed_and_started_again(stop, monkeypatch):
    monkeypatch.setattr(supervisor, "_FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(heartbeat, "_TRY_TIMEOUT_S", 0.5)
    monkeypatch.setattr(heartbeat, "_INTERVAL_S", 0.01)
    (port,) = free_ports(1)
    serve = f"import http.server as h; h.HTTPServer(('127.0.0.1', {port}), h.SimpleHTTPRequestHandler)"
    beats = heartbeat.Heartbeat("127.0.0.1", port)
    one = Supervised(lambda: child(f"{serve}.serve_forever()"), stop, lambda c: "it died", heartbeat=beats)

    def is_answering():
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{port}/", timeout=0.2).status_code
        return False

    first = one.child
    look_until(one.look, is_answering)
    assert one.child is first, "while its port is closed it starts"
    os.kill(first._process.pid, signal.SIGSTOP)
    look_until(one.look, lambda: one.child is not first)
    look_until(one.look, is_answering)
    one.stop(5)
    beats.stop()
