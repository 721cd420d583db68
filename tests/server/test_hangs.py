"""What stands still and has not died: an encoder inside, and the whole server. Figures are printed (-s)."""

import os
import signal
import threading
import time

import pytest

from tests.support.checkpoints import own_code
from tests.support.load import tell
from tests.support.server import serve, wait_until

# Machines are noisy: what is measured is printed, and these are far above it.
NOTICE_S = 30
RECOVERY_S = 200
pytestmark = pytest.mark.timeout(900)
# Code of the checkpoint's own that never comes back where it finds a certain file, once.
_HANG = """
import contextlib, os, threading

def hang_once():
    with contextlib.suppress(FileNotFoundError):
        os.remove({file!r})
        threading.Event().wait()
"""


@pytest.fixture(scope="module")
def order(tmp_path_factory):
    """The file that is an order to hang."""
    return tmp_path_factory.mktemp("order") / "hang"


@pytest.fixture(scope="module")
def hanging(tmp_path_factory, order):
    """A model whose heads run in the encoder's process, and one of them is the checkpoint's own code."""
    folder = tmp_path_factory.mktemp("hangs")
    checkpoint = own_code(folder / "own")
    code = (checkpoint / "scaling.py").read_text()
    code = code.replace("    return", "    hang_once()\n    return") + _HANG.format(file=str(order))
    (checkpoint / "scaling.py").write_text(code)
    with serve(
        folder / "output",
        checkpoint,
        *("--task", "embed", "--trust-remote-code", "--fuse-heads", "--dtype", "float32"),
        GATEWAY_PATIENCE_S="12",
        GATEWAY_REPAIR_WAIT_S=str(RECOVERY_S),
    ) as running:
        yield running


def is_ready(serving):
    return serving.get("/ready")[0] == 200


def process(serving, *words):
    (pid,) = [pid for pid, line in serving.descendants().items() if all(word in line for word in words)]
    return pid


def test_an_encoder_that_hangs_inside_is_replaced_and_the_request_in_it_answered(hanging, order):
    status, expected = hanging.post({"input": "a"})
    assert status == 200
    before = process(hanging, "python_backend_stub", "/own.encoder/")
    order.touch()
    moment = time.monotonic()
    answers = []
    client = threading.Thread(target=lambda: answers.append(hanging.post({"input": "a"})))
    client.start()
    wait_until(lambda: not is_ready(hanging), "the hang to be noticed", RECOVERY_S)
    noticed = time.monotonic() - moment
    client.join(RECOVERY_S)
    answered = time.monotonic() - moment
    assert answers == [(200, expected)]
    assert not order.exists()
    wait_until(lambda: is_ready(hanging), "the model to be back", RECOVERY_S)
    assert process(hanging, "python_backend_stub", "/own.encoder/") != before
    tell(
        f"\nan encoder hung inside, with a patience of 12 s: /ready told it after {noticed:.1f} s, the "
        f"request was answered after {answered:.1f} s"
    )


def test_a_server_that_stands_still_is_told_and_started_again(hanging):
    wait_until(lambda: is_ready(hanging), "the model")
    before = process(hanging, "bin/tritonserver")
    os.kill(before, signal.SIGSTOP)
    moment = time.monotonic()
    wait_until(lambda: not is_ready(hanging), "the halt to be noticed", NOTICE_S)
    noticed = time.monotonic() - moment
    reason = hanging.get("/ready")[1]["models"]["own"]["reason"]
    wait_until(lambda: is_ready(hanging), "the server to be back", RECOVERY_S)
    tell(
        f"\nthe server stood still: /ready told it after {noticed:.1f} s ({reason}), and it was back after "
        f"{time.monotonic() - moment:.1f} s"
    )
    assert process(hanging, "bin/tritonserver") != before
    assert hanging.post({"input": "a"})[0] == 200
    said = hanging.output.read_text()
    assert "tritonserver takes connections but has answered none for 10 s; killing it" in said
    assert "Traceback" not in said
