"""Starting, failing and stopping, as a person meets it."""

import json
import os
import re
import shlex
import signal
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tritonclient.http

from tests.conftest import ROOT
from tests.support.checkpoints import sentence_transformer, write_json
from tests.support.pipeline import cosine
from tests.support.server import COMMAND, free_ports, serve, wait_until

TRITONSERVER = ROOT / ".venv" / "bin" / "tritonserver"


def shared_memory(pid):
    return list(Path("/dev/shm").glob(f"triton_embeddings_{pid}_*"))


def is_alive(pid):
    return Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_text() != ""


def assert_listens_on_loopback_only(serving):
    listening = [
        line for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    ports = {int(address.rsplit(":", 1)[1]) for address in (serving.url, serving.http, serving.grpc)}
    found = {}
    for line in listening:
        local, state = line.split()[1], line.split()[3]
        port = int(local.split(":")[1], 16)
        if state == "0A" and port in ports:
            found[port] = local.split(":")[0]
    assert set(found) == ports
    # 127.0.0.1, or the same in a socket of both families.
    assert set(found.values()) <= {"0100007F", "0000000000000000FFFF00000100007F"}


def test_scripts_serve_from_any_folder_to_the_end(tmp_path, reference):
    """What the README promises: one command, the printed curl line, Ctrl-C."""
    with serve(tmp_path / "output", command=[ROOT / "scripts" / "serve"]) as serving:
        said = serving.output.read_text()
        assert re.search(r"all-MiniLM-L6-v2 +embed, tokens +384 +256", said)
        curl = re.search(r"^ +(curl .*)$", said, re.MULTILINE)[1]
        answer = subprocess.run(shlex.split(curl), capture_output=True, check=True, timeout=60).stdout
        got = np.array(json.loads(answer)["data"][0]["embedding"])[None]
        assert cosine(got, reference.encode(["Hello, world"]))[0] >= 0.999
        assert_listens_on_loopback_only(serving)
        children = serving.descendants()
        assert any("tritonserver" in line for line in children.values())
        assert any("triton_python_backend_stub" in line for line in children.values())
        assert shared_memory(serving.process.pid)
        # The whole group, as a terminal's Ctrl-C would; the children are in sessions of their own.
        serving.process.send_signal(signal.SIGINT)
        assert serving.process.wait(60) == 0
    assert "stopping" in serving.output.read_text()
    wait_until(lambda: not any(map(is_alive, children)), "the end of all processes", 20)
    assert shared_memory(serving.process.pid) == []


@pytest.fixture
def checkpoint(tmp_path):
    return sentence_transformer(tmp_path / "tiny", {"pooling_mode": "mean"})


def test_a_request_in_flight_survives_sigterm(tmp_path, checkpoint):
    # The slow request: long texts in a model that may hold few tokens at a time.
    with serve(tmp_path / "output", checkpoint, "--max-batch-tokens", 16, "--dtype", "float32") as serving:
        answers = []
        body = {"input": ["a value of this class " * 8] * 200, "truncate": True}
        sender = threading.Thread(target=lambda: answers.append(serving.post(body)))
        sender.start()

        wait_until(lambda: serving.turns("tiny") > 20, "the request to reach the encoder")
        assert answers == [], "the request must still run"
        code = serving.stop()
        sender.join(200)
    ((status, answer),) = answers
    assert (status, len(answer["data"])) == (200, 200)
    assert code == 0


def test_a_model_that_cannot_be_brought_back_is_told(tmp_path, checkpoint):
    with serve(tmp_path / "output", checkpoint, GATEWAY_REPAIR_WAIT_S="1") as serving:
        assert serving.get("/ready")[0] == 200
        (stub,) = [
            pid for pid, line in serving.descendants().items() if "stub" in line and "tiny.encoder" in line
        ]
        weights = checkpoint / "model.safetensors"
        weights.rename(checkpoint / "gone")
        os.kill(stub, signal.SIGKILL)
        body = wait_until(
            lambda: (
                (found := serving.get("/ready"))[0] == 503
                and "cannot be loaded anew" in str(found[1]["models"]["tiny"]["reason"])
                and found[1]
            ),
            "/ready to tell why",
            120,
        )
        assert not body["models"]["tiny"]["ready"]
        assert serving.get("/health")[0] == 200
        status, answer = serving.post({"input": "a"})
        assert status == 503
        assert "tiny does not answer" in answer["error"]["message"]
        # It is tried again and again.
        (checkpoint / "gone").rename(weights)
        wait_until(lambda: serving.get("/ready")[0] == 200, "the model to be back")
        assert serving.post({"input": "a"})[0] == 200


def test_requests_that_a_dead_process_had_taken_in_are_answered_by_the_next(tmp_path, checkpoint):
    with serve(
        tmp_path / "output",
        checkpoint,
        "--max-batch-tokens",
        16,
        "--dtype",
        "float32",
        GATEWAY_REPAIR_WAIT_S="120",
    ) as serving:
        answers = []
        body = {"input": ["a value of this class " * 8] * 200, "truncate": True}
        sender = threading.Thread(target=lambda: answers.append(serving.post(body)))
        sender.start()
        wait_until(lambda: serving.turns("tiny") > 20, "the request to reach the encoder")
        (stub,) = [
            pid for pid, line in serving.descendants().items() if "stub" in line and "tiny.encoder" in line
        ]
        os.kill(stub, signal.SIGKILL)
        sender.join(200)
        ((status, answer),) = answers
        assert (status, len(answer["data"])) == (200, 200)


def failed(*arguments):
    ports = [
        part for flag in ("--port", "--http-port", "--grpc-port", "--metrics-port") for part in (flag, 0)
    ]
    command = [str(part) for part in (COMMAND, "serve", *arguments, *ports)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")


def test_weights_of_another_model(checkpoint):
    config = checkpoint / "config.json"
    content = json.loads(config.read_text())
    write_json(config, {**content, "num_hidden_layers": 5})
    result = failed(checkpoint)
    assert result.returncode == 1
    assert re.search(
        r"error: the model tiny cannot be loaded: .* lacks \d+ weights of a BertModel", result.stderr
    )


def test_a_model_that_loads_but_fails_is_told(checkpoint):
    """Its tokenizer knows more tokens than it has embeddings for."""
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    weights[name] = weights[name][:8].clone()
    safetensors.torch.save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    config = checkpoint / "config.json"
    write_json(config, {**json.loads(config.read_text()), "vocab_size": 8})
    result = failed(checkpoint)
    assert result.returncode == 1
    assert "error: the model tiny is loaded but fails: the model failed on this request" in result.stderr


def test_the_server_s_own_command(tmp_path):
    """tritonserver --model-repository=model_repository, by hand."""
    http, grpc, metrics = free_ports(3)
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [
                TRITONSERVER,
                "--model-repository=model_repository",
                f"--http-port={http}",
                f"--grpc-port={grpc}",
                f"--metrics-port={metrics}",
            ],
            cwd=ROOT,
            stdout=stream,
            stderr=stream,
        )
    try:
        client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{http}")

        def is_ready():
            assert process.poll() is None, log.read_text()
            try:
                return client.is_model_ready("all-MiniLM-L6-v2")
            except OSError:
                return False

        wait_until(is_ready, "the default model")
        text = tritonclient.http.InferInput("text", [1, 1], "BYTES")
        text.set_data_from_numpy(np.array([[b"hello"]], object))
        assert client.infer("all-MiniLM-L6-v2", [text]).as_numpy("dense").shape == (1, 384)
        client.close()
    finally:
        process.terminate()
        assert process.wait(60) == 0
