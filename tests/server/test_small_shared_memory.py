"""Where /dev/shm is as small as Docker makes it. Figures are printed (-s)."""

import functools
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import bert, sentence_transformer
from tests.support.load import tell
from tests.support.server import COMMAND, serve, wait_until

# As a container has it that nobody gave more.
SIZE = "64m"
pytestmark = pytest.mark.timeout(900)
MOUNT = f"mount -t tmpfs -o size={SIZE} tmpfs /dev/shm"


COMMAND_IN_IT = ("unshare", "--mount", "sh", "-c", f'{MOUNT} && exec "$@"', "sh", COMMAND, "serve")


def test_all_stages_and_large_requests_within_64_mb(tmp_path):
    """A mount of this process's own; it takes the rights of root, or a user namespace."""
    checkpoint = sentence_transformer(tmp_path / "tiny", {"pooling_mode": "mean"})
    with serve(tmp_path / "output", checkpoint, "--dtype", "float32", command=COMMAND_IN_IT) as serving:
        texts = [f"text {i} of a long list of words that takes room " * 8 for i in range(2048)]
        status, body = serving.post({"model": "tiny", "input": texts[:1], "truncate": True})
        assert status == 200, body
        alone = np.array(body["data"][0]["embedding"])
        status, body = serving.post({"model": "tiny", "input": texts, "truncate": True})
        tell(f"\n2048 texts with {SIZE} of /dev/shm: {status} {str(body)[:200]}")
        assert status == 200
        assert np.allclose(np.array(body["data"][0]["embedding"]), alone, atol=1e-4)
        tokens = {"model": "tiny", "inputs": texts[:512], "truncate": True}
        status, body = serving.post(tokens, "/embed_all")
        tell(f"all vectors of 512 texts with {SIZE} of /dev/shm: {status} {str(body)[:200]}")
        assert status in (200, 413, 503)
        status, body = serving.post({"model": "tiny", "input": texts[:1], "truncate": True})
        assert status == 200, body
        assert np.allclose(np.array(body["data"][0]["embedding"]), alone, atol=1e-4)
        assert serving.stop(90) == 0


def test_hidden_states_of_a_usual_width_fill_it_and_every_answer_is_right_or_says_why(tmp_path):
    """One budget of 16 384 tokens of 1024 float32 values is as large as all of it."""
    base = functools.partial(
        bert, max_length=512, hidden_size=1024, num_hidden_layers=1, num_attention_heads=16
    )
    checkpoint = sentence_transformer(
        tmp_path / "tiny", {"pooling_mode": "mean"}, transformer={"max_seq_length": 512}, base=base
    )
    arguments = (checkpoint, "--dtype", "float32")
    with serve(tmp_path / "output", *arguments, command=COMMAND_IN_IT) as serving:
        said = serving.output.read_text()
        assert "/dev/shm has 64 MiB, and the models may need 256 MiB" in said
        texts = [f"text {i} of a list of words that takes room " * 12 for i in range(96)]

        def ask(count: int, path: str = "/v1/embeddings") -> tuple[int, str]:
            field = "input" if path == "/v1/embeddings" else "inputs"
            status, body = serving.post({"model": "tiny", field: texts[:count], "truncate": True}, path)
            if status == 200 and field == "input":
                vectors = np.array([row["embedding"] for row in body["data"]])
                np.testing.assert_allclose(vectors[: len(alone)], alone[:count], atol=1e-4)
            assert status in (200, 413, 503), body
            return status, "" if status == 200 else str(body)

        alone = np.empty((0, 1024))
        for text in texts[:8]:
            status, body = serving.post({"model": "tiny", "input": text, "truncate": True})
            assert status == 200, body
            alone = np.concatenate([alone, [body["data"][0]["embedding"]]])
        told = []
        for count in (8, 32, 96, 32, 8):
            status, reason = ask(count)
            tell(f"{count} texts of 1024 values a token with {SIZE} of /dev/shm: {status} {reason[:300]}")
            told.append(reason)
        assert any("--shm-size" in reason for reason in told), "a control: it was too small for some"
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, [1, 64, 4, 96, 2, 16, 1, 8] * 3))
        tell(f"24 requests by 8 clients: {sorted(status for status, _ in answers)}")
        assert all("--shm-size" in reason for status, reason in answers if status == 503)
        status, reason = ask(96, "/embed_all")
        tell(f"all vectors of 96 texts: {status} {reason[:300]}")
        # Processes keep what they have taken, so there may be no room again for what went through before.
        assert ask(1)[0] == 200
        log = serving.server_log()
        assert "cannot be sent" not in log
        assert serving.stop(90) == 0


def test_what_an_encoder_that_died_keeps_of_it_is_given_back(tmp_path):
    """Its region is as large as its largest batch was, and the server keeps it for good (2.51)."""
    base = functools.partial(
        bert, max_length=512, hidden_size=384, num_hidden_layers=1, num_attention_heads=6
    )
    checkpoint = sentence_transformer(
        tmp_path / "tiny", {"pooling_mode": "mean"}, transformer={"max_seq_length": 512}, base=base
    )
    texts = [f"text {i} of a list of words that takes room " * 20 for i in range(80)]
    body = {"model": "tiny", "input": texts, "truncate": True}
    arguments = (checkpoint, "--dtype", "float32")
    with serve(
        tmp_path / "output", *arguments, command=COMMAND_IN_IT, GATEWAY_REPAIR_WAIT_S="300"
    ) as serving:
        status, answer = serving.post(body)
        assert status == 200, answer
        right = np.array([row["embedding"] for row in answer["data"]])
        # Sometimes a death is the server's own, and sometimes no request was inside.
        for _ in range(6):
            before = die_and_be_given_back(serving, body)
            status, answer = serving.post(body)
            assert status == 200, answer
            np.testing.assert_allclose([row["embedding"] for row in answer["data"]], right, atol=1e-4)
            told = r"does not give back \d+ MiB of /dev/shm, and threads, of a stage that died"
            if re.search(told, serving.output.read_text()):
                break
        else:
            pytest.fail(serving.everything_said())
        tell(f"{before} of 64 MiB of an encoder that died are back")


def die_and_be_given_back(serving, body):
    """Ends the encoder under load; how large its region was, in MiB."""
    (encoder,) = (pid for pid, line in serving.descendants().items() if "tiny.encoder/1/model.py" in line)
    words = Path(f"/proc/{encoder}/cmdline").read_text().split("\0")
    region = next(word for word in words if word.startswith("triton_embeddings_"))
    file = Path(f"/proc/{serving.process.pid}/root/dev/shm/{region}")
    before = file.stat().st_size >> 20
    assert before > 16, "a control: more than what a stage that died may keep"
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(serving.post, body) for _ in range(16)]
        wait_until(lambda: any(one.done() for one in asked), "an answer")
        os.kill(encoder, signal.SIGKILL)
        answers = [one.result() for one in asked]
    statuses = sorted(status for status, _ in answers)
    tell(f"\n16 requests of 80 long texts at the encoder's death: {statuses}")
    assert set(statuses) <= {200, 503}, answers
    wait_until(lambda: not file.exists(), "its region to be given back", 120, serving.everything_said)
    wait_until(lambda: serving.get("/ready")[0] == 200, "it to be ready", also=serving.everything_said)
    return before
