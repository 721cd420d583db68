"""Clients that go away, at a real uvicorn."""

import asyncio
import contextlib
import json
import logging

import pytest
import uvicorn

from gateway.app import create_app
from gateway.middleware.disconnect import Disconnect
from gateway.settings import Settings
from tests.support.fake_inference import FakeInference


class Held(FakeInference):
    """Tells what came in, and what was cancelled."""

    def __init__(self):
        super().__init__()
        self.begun = asyncio.Queue()
        self.cancelled = asyncio.Queue()

    async def infer(self, pipeline, items, outputs, parameters, stage=None):
        if b"ready?" in items:
            return await super().infer(pipeline, items, outputs, parameters, stage)
        self.begun.put_nowait(items)
        try:
            return await super().infer(pipeline, items, outputs, parameters, stage)
        except asyncio.CancelledError:
            self.cancelled.put_nowait(items)
            raise


@contextlib.asynccontextmanager
async def served(app, **options):
    config = uvicorn.Config(
        app, port=0, loop="asyncio", http="httptools", log_level="warning", access_log=False, **options
    )
    server = uvicorn.Server(config)
    # A test's signals are not the server's business.
    server.capture_signals = contextlib.nullcontext
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    server.port = server.servers[0].sockets[0].getsockname()[1]
    server.running = running
    try:
        yield server
    finally:
        server.should_exit = True
        await asyncio.wait_for(running, 20)


@pytest.fixture
async def inference():
    return Held()


@pytest.fixture
async def server(inference):
    async with served(create_app(Settings(), inference)) as made:
        yield made


def request(text="a", head="", body=None):
    body = json.dumps({"input": text}).encode() if body is None else body
    lines = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{head}\r\n"
    return lines.encode() + body


async def read_answer(reader):
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    (length,) = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    return int(head.split()[1]), json.loads(await reader.readexactly(int(length.split(b":")[1])))


async def within(queue):
    return await asyncio.wait_for(queue.get(), 20)


async def test_work_ends_with_the_client_that_wanted_it(server, inference, caplog):
    inference.release.clear()
    caplog.set_level(logging.INFO)
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request("gone", "x-request-id: me\r\n"))
    assert await within(inference.begun) == [b"gone"]
    writer.close()
    assert await within(inference.cancelled) == [b"gone"]
    inference.release.set()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request("other"))
    assert (await read_answer(reader))[0] == 200
    writer.close()
    assert "me: its client has gone away" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_body_in_chunks_and_a_client_that_leaves_after_it(server, inference):
    inference.release.clear()
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    for piece in (b'{"input"', b': "ab', b'c"}'):
        writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        await writer.drain()
    writer.write(b"0\r\n\r\n")
    assert await within(inference.begun) == [b"abc"]
    assert inference.cancelled.empty()
    writer.close()
    assert await within(inference.cancelled) == [b"abc"]


async def test_a_client_that_leaves_while_it_sends_is_told_to_who_reads(server, inference, caplog):
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request()[:-3])
    await writer.drain()
    writer.close()
    reader, other = await asyncio.open_connection("127.0.0.1", server.port)
    other.write(request("b"))
    assert (await read_answer(reader))[0] == 200
    other.close()
    assert await within(inference.begun) == [b"b"], "the other request never came to anything"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_connections_that_are_kept_alive_and_requests_that_follow_at_once(server, inference):
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    for i in range(3):
        writer.write(request(f"one {i}"))
        assert (await read_answer(reader))[0] == 200
    # Before the answers to those before them.
    writer.write(b"".join(request(f"more {i}") for i in range(3)))
    for _ in range(3):
        assert (await read_answer(reader))[0] == 200
    writer.close()
    assert inference.cancelled.empty()


async def test_a_server_that_stops_answers_what_it_has(inference):
    async with served(create_app(Settings(), inference)) as server:
        inference.release.clear()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request())
        await within(inference.begun)
        server.should_exit = True
        inference.release.set()
        assert (await read_answer(reader))[0] == 200
        writer.close()
        await asyncio.wait_for(server.running, 20)
    assert inference.cancelled.empty()


async def test_a_server_that_stops_does_not_wait_longer_than_it_may(inference):
    async with served(create_app(Settings(), inference), timeout_graceful_shutdown=1) as server:
        inference.release.clear()
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request())
        await within(inference.begun)
        server.should_exit = True
        await asyncio.wait_for(server.running, 20)
        writer.close()
    assert await within(inference.cancelled) == [b"a"]


async def test_an_answer_in_pieces_ends_with_its_client():
    ended = asyncio.Queue()
    told = asyncio.Queue()

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            return
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

        async def listen():
            told.put_nowait(await receive())

        listener = asyncio.create_task(listen())
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x" * 100, "more_body": True})
                await asyncio.sleep(0.01)
        finally:
            await listener
            ended.put_nowait("ended")

    async with served(Disconnect(app), lifespan="off") as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request())
        assert b"200" in await reader.readline()
        writer.close()
        assert await within(ended) == "ended"
        assert await within(told) == {"type": "http.disconnect"}, "who asks is told, too"


async def test_what_goes_on_after_the_answer_is_not_cut_off():
    done = asyncio.Queue()

    async def app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})
        await asyncio.sleep(0.05)
        done.put_nowait("done")

    async with served(Disconnect(app), lifespan="off") as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request())
        assert await read_answer(reader) == (200, {})
        writer.close()
        assert await within(done) == "done"
