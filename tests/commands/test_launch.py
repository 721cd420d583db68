import pytest

from triton_embeddings.addresses import Addresses
from triton_embeddings.launch import describe_start, gateway_environment

ADDRESSES = Addresses("127.0.0.1", 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("flags", "hosts", "is_allowed"),
    [
        ({}, "cdn.example", "false"),
        ({"image_hosts": "10.0.0.0/8"}, "10.0.0.0/8", "false"),
        ({"allow_image_urls": "true"}, "cdn.example", "true"),
    ],
)
def test_flags_win_over_the_environment_and_leave_the_rest_of_it(monkeypatch, flags, hosts, is_allowed):
    monkeypatch.setenv("GATEWAY_IMAGE_HOSTS", "cdn.example")
    monkeypatch.setenv("GATEWAY_ALLOW_IMAGE_URLS", "false")
    environment = gateway_environment(ADDRESSES, flags)
    assert environment["GATEWAY_IMAGE_HOSTS"] == hosts
    assert environment["GATEWAY_ALLOW_IMAGE_URLS"] == is_allowed
    assert environment["GATEWAY_SERVER"] == "127.0.0.1:3"


def test_what_nobody_sets_is_not_set(monkeypatch):
    monkeypatch.delenv("GATEWAY_IMAGE_HOSTS", raising=False)
    assert "GATEWAY_IMAGE_HOSTS" not in gateway_environment(ADDRESSES, {})


LOG = """\
I1126 17:24:30.227091 18383 model_lifecycle.cc:472] "loading: a.b.dense:1"
I1126 17:24:30.231638 18383 model_lifecycle.cc:472] "loading: a.b.encoder:1"
I1126 17:24:30.232613 18383 python_be.cc:2249] "TRITONBACKEND_ModelInstanceInitialize: a.b.encoder_0_0 (CPU)"
I1126 17:24:30.233335 18383 model_lifecycle.cc:472] "loading: a.b.tokenizer:1"
I1126 17:24:37.242804 18383 model_lifecycle.cc:839] "successfully loaded 'a.b.dense'"
E1126 17:24:37.242804 18383 model_lifecycle.cc:642] "failed to load 'a.b.tokenizer' version 1: Internal: why"
"""
DONE = """\
I1126 17:24:40.551545 18383 model_lifecycle.cc:839] "successfully loaded 'a.b.encoder'"
"""


def test_a_long_start_says_what_it_waits_for(tmp_path):
    log = tmp_path / "server.log"
    for nothing in ({}, {"error": "unexpected"}, {"models": {}, "reason": None}):
        told = describe_start(nothing, log)
        assert told == f"the gateway does not answer yet (the server's log: {log})"
    log.write_text(LOG)
    assert describe_start({}, log) == f"still loading a.b.encoder (the server's log: {log})"
    log.write_text(LOG + DONE)
    assert describe_start({"models": {}, "reason": "no server"}, log) == (
        f"no server (the server's log: {log})"
    )
    models = {"x": {"reason": None}, "y": {"reason": "it has not answered yet"}}
    assert describe_start({"models": models}, log) == (
        "the models are loaded, and have not answered yet (y: it has not answered yet)"
    )
