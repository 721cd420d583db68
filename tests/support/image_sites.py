"""Web servers on loopback that images are fetched from, well-behaved and otherwise."""

import asyncio
import contextlib

from aiohttp import web


class Site:
    """Answers by path, and remembers what it was asked."""

    def __init__(self, answers):
        self.answers = answers
        self.requests = []

    async def answer(self, request):
        self.requests.append(request)
        return await self.answers[request.path](request)


@contextlib.asynccontextmanager
async def site(answers, host="127.0.0.1", port=0):
    """A server whose `answers` are coroutine functions by path. Gives the site and its URL."""
    made = Site(answers)
    app = web.Application()
    app.router.add_get("/{path:.*}", made.answer)
    # A client that left ends what was being answered, else stopping would wait for it.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    try:
        listener = web.TCPSite(runner, host, port)
        await listener.start()
        made.port = runner.addresses[0][1]
        made.url = f"http://{host}:{made.port}"
        yield made
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def raw_site(answer):
    """A server that speaks by the byte: `answer(writer)` follows the request's head. Gives its URL, and what
    is set when a client has closed its connection.
    """
    closed = asyncio.Event()

    async def serve(reader, writer):
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            await answer(writer)
            await reader.read()
        closed.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", closed
