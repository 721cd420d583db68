"""Models that are added, replaced and removed while they serve. Figures are printed (-s)."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import safetensors.torch
import tritonclient.grpc

from tests.support.checkpoints import sentence_transformer
from tests.support.load import TEXTS, tell, under_load, until
from tests.support.server import COMMAND, serve, wait_until

ADMIN_KEY = "the-operators-own-key"
WAIT_S = 600
pytestmark = pytest.mark.timeout(900)
STAGES = ("tokenizer", "encoder", "dense", "tokens")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two of the same kind with other weights, and two that are broken."""
    folder = tmp_path_factory.mktemp("checkpoints")
    sentence_transformer(folder / "first", {"pooling_mode": "mean"})
    shutil.copytree(folder / "first", folder / "second")
    weights = safetensors.torch.load_file(folder / "first" / "model.safetensors")
    other = {name: value.flip(0).contiguous() for name, value in weights.items()}
    safetensors.torch.save_file(other, folder / "second" / "model.safetensors", {"format": "pt"})
    # It cannot be loaded.
    shutil.copytree(folder / "first", folder / "short")
    config = json.loads((folder / "short" / "config.json").read_text())
    (folder / "short" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    # It can, and fails every request: its tokenizer knows more tokens than it has embeddings for.
    shutil.copytree(folder / "first", folder / "failing")
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    few = {**weights, name: weights[name][:8].clone()}
    safetensors.torch.save_file(few, folder / "failing" / "model.safetensors", {"format": "pt"})
    (folder / "failing" / "config.json").write_text(
        json.dumps({**json.loads((folder / "first" / "config.json").read_text()), "vocab_size": 8})
    )
    return folder


@pytest.fixture(scope="module")
def serving(tmp_path_factory, checkpoints):
    folder = tmp_path_factory.mktemp("live")
    subprocess.run(
        [
            *(COMMAND, "add", checkpoints / "first", "--name", "tiny", "--dtype", "float32"),
            *("--model-repository", folder / "models"),
        ],
        check=True,
        timeout=WAIT_S,
    )
    with serve(
        folder / "output",
        "--model-repository",
        folder / "models",
        GATEWAY_ADMIN_KEY=ADMIN_KEY,
        GATEWAY_REPAIR_WAIT_S=str(WAIT_S),
    ) as running:
        yield running


def live(serving, *arguments):
    command = [COMMAND, *arguments, "--live", "--grpc-port", serving.grpc.rsplit(":", 1)[1]]
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=WAIT_S, cwd="/")


def embeddings(serving, model="tiny"):
    status, body = serving.post({"model": model, "input": TEXTS, "truncate": True})
    assert status == 200, body
    return np.array([row["embedding"] for row in body["data"]])


def entries(serving):
    client = tritonclient.grpc.InferenceServerClient(serving.grpc)
    index = client.get_model_repository_index()
    client.close()
    return {model.name for model in index.models if model.state == "READY"}


async def test_new_weights_take_over_under_load(serving, checkpoints):
    old = await asyncio.to_thread(embeddings, serving)
    added = live(serving, "add", checkpoints / "second", "--name", "other", "--dtype", "float32")
    assert added.returncode == 0, added.stderr
    new = await asyncio.to_thread(embeddings, serving, "other")
    assert not np.allclose(old, new, atol=0.01)
    removed = live(serving, "remove", "other")
    assert removed.returncode == 0, removed.stderr
    async with under_load(serving.url, "tiny", old, 12, new) as load:
        begun = time.monotonic()
        replaced = await asyncio.to_thread(
            live, serving, "add", checkpoints / "second", "--name", "tiny", "--dtype", "float32"
        )
        assert replaced.returncode == 0, replaced.stderr
        done = time.monotonic()
        count = len(load.answers)
        await until(lambda: len(load.answers) > count + 64, "answers of the new weights")
    firsts = [at for at, whose in load.answers if whose == "new"]
    lasts = [at for at, whose in load.answers if whose == "old"]
    tell(
        f"\nreplaced in {done - begun:.1f} s under load; the first new answer came after "
        f"{firsts[0] - begun:.2f} s, the last old one {lasts[-1] - firsts[0]:.2f} s later; "
        f"{len(load.answers)} right answers, failures {[what for _, what in load.failures]}, "
        f"slowest {load.slowest_s:.2f} s"
    )
    assert load.failures == []
    assert replaced.stdout.startswith("replaced tiny:")
    assert entries(serving) == {"tiny", *(f"tiny.{stage}.2" for stage in STAGES)}
    # The entries of the generation before are gone from the disk, too, and tokens are asked for at the new.
    status, _ = serving.post({"inputs": "a"}, "/tokenize")
    assert status == 200


@pytest.mark.parametrize(
    ("broken", "reason"), [("short", "lacks"), ("failing", "the new model is loaded but fails")]
)
async def test_a_broken_checkpoint_leaves_the_old_one_serving(serving, checkpoints, broken, reason):
    old = await asyncio.to_thread(embeddings, serving)
    before = entries(serving)
    async with under_load(serving.url, "tiny", old, clients=4) as load:
        result = await asyncio.to_thread(
            live, serving, "add", checkpoints / broken, "--name", "tiny", "--dtype", "float32"
        )
    assert result.returncode == 1
    assert reason in result.stderr
    assert "everything stays as it was" in result.stderr
    tell(f"\n{result.stderr.strip()}")
    assert load.failures == []
    assert entries(serving) == before
    wait_until(lambda: serving.get("/ready")[0] == 200, "ready")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
async def test_a_change_that_is_broken_off_is_undone(serving, checkpoints, how):
    old = await asyncio.to_thread(embeddings, serving)
    before, folders = entries(serving), sorted(os.listdir(serving.output.parent / "models"))
    known = set(serving.descendants())
    async with under_load(serving.url, "tiny", old, clients=4) as load:
        port = serving.grpc.rsplit(":", 1)[1]
        command = [COMMAND, "add", checkpoints / "second", "--name", "tiny", "--live", "--grpc-port", port]
        with subprocess.Popen([str(c) for c in command], stderr=subprocess.PIPE, cwd="/") as process:
            # The server has begun to load: the process of a new stage is there.
            await until(
                lambda: any(".encoder." in c for p, c in serving.descendants().items() if p not in known),
                "a process of the new encoder",
            )
            process.send_signal(how)
            begun = time.monotonic()
            told = (await asyncio.to_thread(process.communicate, timeout=WAIT_S))[1].decode()
    tell(
        f"\n{how.name} in the middle: undone after {time.monotonic() - begun:.1f} s; it said {told.strip()!r}"
    )
    assert (process.returncode, told.strip()) == (1, "error: interrupted; everything stays as it was")
    assert load.failures == []
    assert entries(serving) == before
    assert sorted(os.listdir(serving.output.parent / "models")) == folders
    wait_until(lambda: serving.get("/ready")[0] == 200, "ready")
    np.testing.assert_allclose(await asyncio.to_thread(embeddings, serving), old, atol=2e-3)


def test_a_port_without_a_server(serving):
    result = subprocess.run(
        [str(COMMAND), "remove", "tiny", "--live", "--grpc-port", "9", "--model-repository", "/"],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert result.returncode == 1
    assert "no tritonserver answers at 127.0.0.1:9" in result.stderr


def test_models_are_changed_over_http(serving, checkpoints):
    assert serving.delete("/admin/models/tiny")[0] == 401
    status, body = serving.post(
        {"checkpoint": str(checkpoints / "first"), "name": "third", "options": {"dtype": "float32"}},
        "/admin/models",
        ADMIN_KEY,
    )
    assert status == 200, body
    assert body["message"].startswith("added third: bert, 32 dimensions")
    assert embeddings(serving, "third").shape == (16, 32)
    assert {model["name"] for model in serving.get("/admin/models", ADMIN_KEY)[1]["models"]} == {
        "tiny",
        "third",
    }
    status, body = serving.post({"checkpoint": "/nowhere"}, "/admin/models", ADMIN_KEY)
    assert status == 400
    assert "/nowhere" in body["error"]
    status, body = serving.delete("/admin/models/third", ADMIN_KEY)
    assert (status, body["message"]) == (200, "removed third")
    assert serving.post({"model": "third", "input": "a"})[0] == 404
    status, body = serving.delete("/admin/models/third", ADMIN_KEY)
    assert status == 400
    assert "has no model 'third'; it holds tiny" in body["error"]


def test_the_exit_code_is_0_after_changes(serving):
    """The last test of this server."""
    assert serving.stop(90) == 0
    assert not os.path.exists(serving.output.parent / "models" / "tiny.encoder")
