"""Changing models over HTTP: what is let through to the command; tests/server/test_live.py runs it."""

import asyncio
import sys

import pytest

from gateway import live_command
from gateway.errors import BadRequest
from gateway.live_command import LiveCommand
from tests.gateway.conftest import running
from tests.support.fake_inference import FakeInference


@pytest.fixture
def ran(monkeypatch):
    """The arguments of every command that would have run."""
    commands = []

    async def run_one(arguments):
        commands.append(list(arguments))
        return "done"

    monkeypatch.setattr(live_command, "_run_one", run_one)
    return commands


KEY = "the-operators-own-key"


async def test_nothing_of_it_is_there_unless_the_settings_say_so(ran):
    async with running(FakeInference()) as client:
        answers = [
            await client.get("/admin/models"),
            await client.post("/admin/models", json={"checkpoint": "a"}),
            await client.delete("/admin/models/tiny"),
        ]
    assert [answer.status_code for answer in answers] == [403] * 3
    assert "GATEWAY_ADMIN_KEY" in answers[0].text
    assert ran == []


async def test_a_change_is_made_at_every_server(ran):
    async with running(FakeInference(), admin_key=KEY, server="127.0.0.1:1,127.0.0.1:2") as client:
        client.headers["x-api-key"] = KEY
        body = {"checkpoint": "a/b", "name": "x", "options": {"max_length": 8, "fuse_heads": False}}
        assert (await client.post("/admin/models", json=body)).json() == {"message": "done"}
        assert (await client.delete("/admin/models/x")).json() == {"message": "done"}
        assert [m["name"] for m in (await client.get("/admin/models")).json()["models"]] == ["tiny"]
    add = ["add", "a/b", "--name", "x", "--max-length=8", "--no-fuse-heads", "--live"]
    assert ran[:2] == [[*add, "--grpc-port=1"], [*add, "--grpc-port=2"]]
    assert ran[2:] == [["remove", "x", "--live", f"--grpc-port={port}"] for port in (1, 2)]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"checkpoint": "--help"}, "begins with '-'"),
        ({"checkpoint": "a", "name": "--live"}, "give a name of letters"),
        (
            {"checkpoint": "a", "options": {"trust_remote_code": True}},
            "'trust_remote_code' cannot be set here",
        ),
        ({"checkpoint": "a", "options": {"model_repository": "/"}}, "'model_repository' cannot be set here"),
        ({"checkpoint": "a", "options": {"-x": "/"}}, "'-x' cannot be set here"),
        ({"checkpoint": "a", "other": 1}, "other"),
        ({}, "checkpoint"),
    ],
)
async def test_what_is_no_checkpoint_name_or_option_is_refused(ran, body, reason):
    async with running(FakeInference(), admin_key=KEY) as client:
        client.headers["x-api-key"] = KEY
        answer = await client.post("/admin/models", json=body)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]
    assert ran == []


@pytest.mark.parametrize("server", ["10.0.0.1:8001", "127.0.0.1:1,models.example:8001"])
async def test_a_server_elsewhere_is_not_mistaken_for_the_one_here(ran, server):
    async with running(FakeInference(), admin_key=KEY, server=server) as client:
        client.headers["x-api-key"] = KEY
        for answer in (
            await client.post("/admin/models", json={"checkpoint": "a"}),
            await client.delete("/admin/models/tiny"),
        ):
            assert answer.status_code == 400
            assert server.split(",")[-1] in answer.json()["error"]
            assert "use triton-embeddings add --live there" in answer.json()["error"]
    assert ran == []


@pytest.mark.parametrize("address", ["localhost:5", "127.0.0.1:5", "127.1.2.3:5", "[::1]:5"])
def test_servers_of_this_machine(address):
    assert live_command._local_port(address) == "5"


async def test_a_client_that_leaves_ends_no_change(monkeypatch):
    begun, goes_on, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def run_one(arguments):
        begun.set()
        await goes_on.wait()
        done.set()
        return "done"

    monkeypatch.setattr(live_command, "_run_one", run_one)
    request = asyncio.create_task(LiveCommand(["127.0.0.1:1"]).remove("tiny"))
    await begun.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    goes_on.set()
    async with asyncio.timeout(10):
        await done.wait()


async def test_a_command_that_is_given_up_has_undone_its_work_when_that_is_told(monkeypatch, tmp_path):
    """The stand-in writes a file when it begins, and deletes it when it is asked to end, a while later."""
    script = (
        "import pathlib, signal, sys, time\n"
        "def undo(*_):\n    time.sleep(0.5); mark.unlink(); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, undo)\n"
        "mark = pathlib.Path(sys.argv[1]); mark.write_text('begun')\n"
        "signal.pause()"
    )
    monkeypatch.setattr(live_command, "_COMMAND", (sys.executable, "-c", script))
    mark = tmp_path / "mark"
    change = asyncio.create_task(live_command._run_one([str(mark)]))
    async with asyncio.timeout(60):
        while not mark.exists():
            await asyncio.sleep(0.01)
        change.cancel()
        with pytest.raises(asyncio.CancelledError):
            await change
    assert not mark.exists()


async def test_a_command_that_fails_says_why():
    with pytest.raises(BadRequest, match="no server was started here"):
        await LiveCommand(["127.0.0.1:9"]).remove("nothing")
