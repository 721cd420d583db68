"""Clients that mean no good, or are broken, over real sockets."""

import contextlib
import json
import socket
import threading
import time

import numpy as np
import pytest

from backends.contract import N_TOKENS, TOKEN_EMBEDDINGS, TRUNCATED
from tests.support.fake_inference import KINDS, FakeInference
from tests.support.gateway import listening
from tests.support.server import wait_until

BODY = json.dumps({"input": "Hello"}).encode()
HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LIMITS = {
    "header_timeout_s": 0.4,
    "body_timeout_s": 1.5,
    "progress_window_s": 0.4,
    "min_bytes_per_s": 1000,
    "max_headers": 20,
    "max_header_bytes": 4000,
    "max_connections": 8,
    "max_body_bytes": 10**6,
}


class Large(FakeInference):
    """Has 300 kB of JSON for every text of /embed_all, at once."""

    async def infer(self, pipeline, items, outputs, parameters, stage=None):
        if TOKEN_EMBEDDINGS not in outputs:
            return await super().infer(pipeline, items, outputs, parameters, stage)
        answer = await super().infer(pipeline, items, [N_TOKENS, TRUNCATED], parameters)
        return {**answer, TOKEN_EMBEDDINGS: [np.ones((9000, 8), np.float32)] * len(items)}


@pytest.fixture(scope="module")
def gateway():
    with listening(Large([KINDS]), **LIMITS) as running:
        yield running


@contextlib.contextmanager
def connect(gateway, receive_buffer=None):
    with socket.socket() as client:
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(30)
        client.connect(gateway.address)
        yield client


def read_all(client):
    """Everything until the other end closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def status_of(answer):
    return int(answer.split(b" ", 2)[1]) if answer else None


def content_of(answer):
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def ask(gateway, body=BODY, more=b"", path=b"/v1/embeddings"):
    with connect(gateway) as client:
        head = HEAD.replace(b"/v1/embeddings", path)
        client.sendall(head + more + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        return read_all(client)


@contextlib.contextmanager
def dripping(client, data, each_s):
    """Sends a byte at a time until the other end has had enough."""
    is_over = threading.Event()

    def drip():
        with contextlib.suppress(OSError):
            for i in range(len(data)):
                client.send(data[i : i + 1])
                if is_over.wait(each_s):
                    return

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@pytest.fixture(autouse=True)
def afterwards(gateway):
    yield
    # Every test leaves the gateway as it should be.
    assert status_of(ask(gateway)) == 200
    wait_until(lambda: gateway.connections == 0, "the connections to be given back", 20)


def test_who_sends_nothing_is_cut_off(gateway):
    with connect(gateway) as client:
        assert read_all(client) == b""


def test_headers_that_drip_are_cut_off(gateway):
    with connect(gateway) as client, dripping(client, HEAD + b"x-more: " + b"y" * 10_000, 0.02):
        assert read_all(client) == b""


def test_headers_that_drip_on_a_connection_that_was_used_are_cut_off(gateway):
    with connect(gateway) as client:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
        assert status_of(client.recv(65536)) == 200
        with dripping(client, HEAD + b"x-more: " + b"y" * 10_000, 0.02):
            assert read_all(client) == b""


def test_a_body_that_drips_is_told_so_in_the_dialect_of_its_request(gateway):
    with connect(gateway) as client:
        client.sendall(HEAD.replace(b"/v1/embeddings", b"/embed") + b"Content-Length: 100000\r\n\r\n")
        with dripping(client, b" " * 100_000, 0.02):
            answer = read_all(client)
    assert status_of(answer) == 408
    assert b"connection: close" in answer.lower()
    content = content_of(answer)
    assert content["error_type"] == "Validation"
    assert "GATEWAY_MIN_BYTES_PER_S" in content["error"]


def test_a_body_that_does_not_come_is_told_so(gateway):
    with connect(gateway) as client:
        client.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        answer = read_all(client)
    assert status_of(answer) == 408
    assert content_of(answer)["error"]["code"] == "slow_body"


def test_a_body_that_comes_steadily_but_takes_too_long_is_told_so(gateway):
    with connect(gateway) as client:
        client.sendall(HEAD + b"Content-Length: 900000\r\n\r\n")
        is_over = threading.Event()

        def send():
            with contextlib.suppress(OSError):
                while not is_over.wait(0.05):
                    client.sendall(b" " * 1000)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        answer = read_all(client)
        is_over.set()
        thread.join()
    assert status_of(answer) == 408
    assert "GATEWAY_BODY_TIMEOUT_S" in content_of(answer)["error"]["message"]


def test_a_body_in_pieces_that_is_fast_enough_is_answered(gateway):
    body = json.dumps({"input": "Hello", "user": "x" * 5000}).encode()
    with connect(gateway) as client:
        client.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
        for at in range(0, len(body), 500):
            client.sendall(body[at : at + 500])
            time.sleep(0.03)
        assert status_of(read_all(client)) == 200


def test_a_body_that_goes_on_after_its_answer_is_cut_off(gateway):
    with connect(gateway) as client:
        client.sendall(HEAD.replace(b"/v1/embeddings", b"/nowhere") + b"Content-Length: 100000\r\n\r\n")
        with dripping(client, b" " * 100_000, 0.02):
            answer = read_all(client)
    assert status_of(answer) == 404


def test_who_does_not_read_a_large_answer_is_cut_off_and_its_memory_given_back(gateway):
    body = json.dumps({"inputs": ["x"] * 100}).encode()
    head = HEAD.replace(b"/v1/embeddings", b"/embed_all")
    with connect(gateway, receive_buffer=4096) as client:
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        # Nothing more is read, and the connection is still gone.
        wait_until(lambda: gateway.connections == 0, "the connection to be cut", 60)


def test_who_reads_a_large_answer_steadily_gets_all_of_it(gateway):
    body = json.dumps({"inputs": ["x"] * 40}).encode()
    head = HEAD.replace(b"/v1/embeddings", b"/embed_all")
    with connect(gateway, receive_buffer=65536) as client:
        client.sendall(head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        parts = []
        while part := client.recv(2**18):
            parts.append(part)
            time.sleep(0.005)
    assert len(content_of(b"".join(parts))) == 40


@pytest.mark.parametrize(
    ("more", "setting"),
    [
        (b"".join(b"x-%d: y\r\n" % i for i in range(30)), "GATEWAY_MAX_HEADERS"),
        (b"x: " + b"y" * 5000 + b"\r\n", "GATEWAY_MAX_HEADER_BYTES"),
    ],
)
def test_too_many_or_too_large_headers_are_told_so(gateway, more, setting):
    answer = ask(gateway, more=more, path=b"/v1/embeddings/dense")
    assert status_of(answer) == 431
    content = content_of(answer)
    assert content["error_code_str"] == "507_ERROR_INPUT_FORMAT_ERROR"
    assert setting in content["message"]
    assert b"x-request-id" in answer.lower()


def test_a_path_that_never_ends_is_told_so(gateway):
    with connect(gateway) as client:
        client.sendall(b"GET /" + b"x" * 100_000)
        answer = read_all(client)
    assert status_of(answer) == 431


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS client
        b"GET / HTTP/9.9\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nx: a\0b\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(gateway, data):
    with connect(gateway) as client:
        client.sendall(data)
        assert status_of(read_all(client)) in (400, 401)


def test_an_upgrade_to_http2_that_java_asks_for_is_passed_over(gateway):
    more = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
    with connect(gateway) as client:
        client.sendall(HEAD + more + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
        assert status_of(client.recv(65536)) == 200


def test_connections_beyond_the_limit_are_told_so_and_probes_are_not(gateway):
    with contextlib.ExitStack() as stack:
        for _ in range(LIMITS["max_connections"]):
            # Busy ones: those that do nothing are cut off soon.
            client = stack.enter_context(connect(gateway))
            client.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        wait_until(lambda: gateway.connections == LIMITS["max_connections"], "all to be there")
        answer = ask(gateway)
        assert status_of(answer) == 503
        assert "GATEWAY_MAX_CONNECTIONS" in content_of(answer)["error"]["message"]
        assert b"retry-after: 1\r\n" in answer.lower()
        with connect(gateway) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert status_of(read_all(client)) == 200


def test_far_more_connections_than_that_are_closed_at_once(gateway):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(gateway)) for _ in range(100)]
        wait_until(lambda: gateway.connections <= LIMITS["max_connections"] + 64, "the rest to be closed")
        assert read_all(clients[-1]) == b""
