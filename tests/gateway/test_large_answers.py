"""Large answers over real connections, plain and TLS: what is held of them, and who is cut off. The server's
own client is canned.
"""

import asyncio
import dataclasses
import json
import ssl

import httpx
import pytest
import trustme

from backends.contract import DENSE, TOKEN_EMBEDDINGS
from gateway import byte_budget
from gateway.context import RequestContext, enter
from gateway.errors import Unavailable
from tests.support.canned_inference import canned_inference, until
from tests.support.fake_inference import PIPELINE
from tests.support.gateway import listening


@pytest.fixture
async def inference():
    return await canned_inference()


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def tls(request, tmp_path):
    """Settings of a gateway, how it is called, and what its clients trust; with and without a certificate."""
    if not request.param:
        return {}, "http", None
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "own.pem")
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    return {"tls_cert_file": tmp_path / "own.pem"}, "https", trusted


# More than the system's buffers of a connection hold.
LARGE = {"input": ["a"] * 512}
WIDTH = 16_384


async def begin_large(inference, gateway, trusted):
    """A client that has read the first line of a large answer."""
    inference.servers[0].client.width = WIDTH
    inference._max_answer_bytes = 2**30
    reader, writer = await asyncio.open_connection(*gateway.address, limit=2**16, ssl=trusted)
    text = json.dumps(LARGE)
    head = f"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-length: {len(text)}\r\n\r\n"
    writer.write((head + text).encode())
    assert b" 200 " in await reader.readline()
    return reader, writer


async def test_answers_that_nobody_reads_keep_out_others_as_large(inference, tls):
    settings, scheme, trusted = tls
    inference.answers = byte_budget.answers(40 * 2**20)
    with listening(inference, min_bytes_per_s=0, **settings) as gateway:
        _, writer = await begin_large(inference, gateway, trusted)
        url = gateway.url.replace("http", scheme)
        held = 512 * WIDTH * 4 - 256 * 2**10
        await until(lambda: inference.answers.held >= held)
        async with httpx.AsyncClient(base_url=url, timeout=60, verify=trusted or True) as client:
            for _ in range(3):
                answer = await client.post("/v1/embeddings", json=LARGE)
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
                assert answer.json()["error"]["code"] == "too_many_answers"
                assert "the operator can raise the limit with GATEWAY_MAX_ANSWER_BYTES_TOTAL" in answer.text
            assert (await client.post("/v1/embeddings", json={"input": "a"})).status_code == 200
            assert inference.answers.held >= held, "it is not read yet"
            writer.transport.abort()
            await until(lambda: inference.answers.held == 0)
            assert (await client.post("/v1/embeddings", json=LARGE)).status_code == 200, "a control"
            await until(lambda: inference.answers.held == 0)


@pytest.mark.parametrize("limit", [{"min_bytes_per_s": 512, "progress_window_s": 1}, {"body_timeout_s": 2}])
async def test_who_does_not_take_a_large_answer_is_cut_off(inference, tls, limit):
    settings, _, trusted = tls
    with listening(inference, **{"min_bytes_per_s": 0, **limit}, **settings) as gateway:
        _, writer = await begin_large(inference, gateway, trusted)
        await until(lambda: gateway.connections == 0)
        await until(lambda: inference.answers.held == 0)
        writer.transport.abort()


async def test_who_takes_a_large_answer_slowly_gets_all_of_it(inference, tls):
    settings, _, trusted = tls
    with listening(inference, progress_window_s=0.5, **settings) as gateway:
        reader, writer = await begin_large(inference, gateway, trusted)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        left = int(head.partition("content-length: ")[2].split()[0])
        while left:
            # A pause of most of the window now and then, in which the system's buffers fill up.
            part = await reader.read(2**16)
            assert part, f"{left} bytes are missing"
            left -= len(part)
            if left // 2**22 != (left + len(part)) // 2**22:
                await asyncio.sleep(0.4)
        await until(lambda: inference.answers.held == 0)
        writer.close()


async def test_an_answer_with_a_vector_for_each_token_that_has_no_room_is_not_computed(inference):
    inference.answers = byte_budget.answers(10**6)
    inference.answers.enter().add(2 * 10**6)
    enter(RequestContext("r"))
    with pytest.raises(Unavailable, match="take 1737856 of 1000000 bytes"):
        await inference.infer(PIPELINE, [b"a"], [TOKEN_EMBEDDINGS], {})
    assert inference.servers[0].client.asked == []
    await inference.infer(PIPELINE, [b"a"], [DENSE], {})
    wide = dataclasses.replace(PIPELINE, dimensions=4096)
    with pytest.raises(Unavailable):
        await inference.infer(wide, [b"a"] * 64, [DENSE], {})
    assert len(inference.servers[0].client.asked) == 1
