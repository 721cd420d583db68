"""Changing models over HTTP: what is let through to the command; tests/server/test_live.py runs it."""

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


async def test_a_command_that_fails_says_why():
    with pytest.raises(BadRequest, match="no server was started here"):
        await LiveCommand(["127.0.0.1:9"]).remove("nothing")
