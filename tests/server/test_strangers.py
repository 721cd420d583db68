"""What people send who are not known, or mean no good, to the real server."""

import collections
import json
import os
import socket
import ssl
import subprocess
import time
import urllib.request
from pathlib import Path

import httpx
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from gateway.app import create_app
from gateway.settings import Settings
from tests.support import checkpoints, multimodal
from tests.support.fake_inference import FakeInference
from tests.support.load import tell
from tests.support.mutations import good_bodies, mutants
from tests.support.oracle import ask
from tests.support.server import COMMAND, serve, wait_until
from triton_embeddings import models

KEY = "sk-everything-here"
FEW = "sk-another-model-only"
MARK = "kiwifruitmarmalade"


def hashed(name, key, **what):
    """An entry of the file, as the command writes it."""
    line = subprocess.check_output([COMMAND, "hash-key", name], input=key, text=True)
    return {**json.loads(line), **what}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    keys = [hashed("all", KEY), hashed("few", FEW, models=["another"])]
    (folder / "keys.json").write_text(json.dumps(keys))
    settings = {"GATEWAY_API_KEYS_FILE": str(folder / "keys.json"), "GATEWAY_LOG_LEVEL": "info"}
    with serve(folder / "output", **settings) as running:
        yield running


@pytest.fixture
def client(guarded):
    with httpx.Client(base_url=guarded.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=200) as made:
        yield made


def embedding(client):
    return client.post("/v1/embeddings", json={"input": ["Hello, world", "Good morning"]}).json()["data"]


def logs(guarded):
    return guarded.output.read_text() + guarded.server_log()


def test_serve_says_who_may_come_in(guarded, client):
    output = guarded.output.read_text()
    assert "this machine alone can use it, with an API key" in output
    assert "Authorization: Bearer KEY" in output
    assert "all-MiniLM-L6-v2   embed" in output, "it lists the models although it has no key of the file"
    assert guarded.get("/v1/models")[0] == 401
    assert guarded.get("/ready")[0] == 200
    assert len(embedding(client)) == 2


def test_clients_of_others_raise_their_own_errors(guarded):
    told = ask("key_clients", url=guarded.url, keys=["sk-unknown-here", FEW, KEY], model="all-MiniLM-L6-v2")
    kinds = {name: [kind for kind, _ in errors] for name, errors in told.items()}
    assert kinds == {
        "cohere": ["UnauthorizedError", "ForbiddenError", ""],
        "cohere_rerank": ["UnauthorizedError", "ForbiddenError", ""],
        "voyage": ["AuthenticationError", "APIError", ""],
        "litellm": ["AuthenticationError", "APIError", ""],
        "huggingface": ["HfHubHTTPError", "HfHubHTTPError", ""],
    }, told
    for name in ("cohere", "cohere_rerank", "voyage", "litellm"):
        assert "not known here" in told[name][0][1], name
        assert "may not use the model" in told[name][1][1], name


def test_nothing_that_is_sent_stands_in_a_log(guarded, client):
    sent = [
        ("/v1/embeddings", {"input": MARK}, 200),
        ("/v1/embeddings", {"input": MARK, "prompt": MARK, "truncate": True}, 200),
        ("/v1/embeddings", {"input": f"{MARK} " * 5000}, 400),
        ("/v1/embeddings", {"input": ["a", {"image": MARK}]}, 400),
        ("/v1/embeddings", {"input": MARK, "model": MARK}, 404),
        ("/v1/embeddings", {"input": MARK, "dimensions": MARK}, 400),
        ("/v1/embeddings", {"input": MARK, "prompt_name": MARK}, 400),
        ("/v1/embeddings", {"input": MARK, "instruction": MARK}, 400),
        ("/v1/embeddings", {"input": MARK, "encoding_format": MARK}, 400),
        ("/v1/embeddings", {"input": MARK, "embedding_types": ["sparse"]}, 400),
        ("/tokenize", {"inputs": MARK}, 200),
        ("/embed_all", {"inputs": MARK}, 200),
        ("/v1/rerank", {"query": MARK, "documents": [MARK]}, 200),
        ("/similarity", {"inputs": {"source_sentence": MARK, "sentences": [MARK]}}, 200),
        (f"/{MARK}?{MARK}={MARK}", {"input": MARK}, 404),
    ]
    for path, body, status in sent:
        # An x-request-id is there to be logged; nothing else is.
        headers = {"cookie": MARK, "user-agent": MARK}
        answer = client.post(path, json=body, headers=headers)
        assert answer.status_code == status, (path, body, answer.text)
    assert client.post("/v1/embeddings", content=f'{{"input": "{MARK}').status_code == 400
    assert client.get("/v1/models", headers={"Authorization": f"Bearer {MARK}"}).status_code == 401
    # A process dies under a request: what the server and the gateway say of it has nothing of it either.
    (encoder,) = [
        pid for pid, command in guarded.descendants().items() if "stub" in command and ".encoder" in command
    ]
    subprocess.run(["kill", "-9", str(encoder)], check=True)
    answer = client.post("/v1/embeddings", json={"input": MARK})
    assert answer.status_code in (200, 503)
    # Else the logs are not those that would tell.
    wait_until(lambda: "was loaded anew" in guarded.output.read_text(), "the gateway to tell of it")
    assert MARK not in logs(guarded)
    assert KEY not in logs(guarded)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """A model of each kind, of the names that the bodies have."""
    folder = tmp_path_factory.mktemp("fuzzed")
    fused = {"dtype": "float32", "fuse_heads": True}
    for path, options in (
        (checkpoints.bge_m3(folder / "m3"), fused),
        (checkpoints.classifier(folder / "reranker", checkpoints.bert), fused),
        (checkpoints.classifier(folder / "classifier", checkpoints.bert, 3, ("good", "bad", "ugly")), fused),
        (multimodal.clip(folder / "gme"), {"dtype": "float32"}),
    ):
        named = {**options, "served_model_name": f"org/{path.name}"}
        models.add(folder / "models", str(path), path.name, named)
    with serve(folder / "output", "--model-repository", folder / "models") as running:
        yield running


@pytest.mark.timeout(900)
def test_mutated_bodies_leave_the_server_as_it_was(fuzzed):
    good = good_bodies(create_app(Settings(), FakeInference()).openapi())
    statuses = collections.Counter()
    answered = set()
    with httpx.Client(base_url=fuzzed.url, timeout=200) as client:
        before = embedding(client)
        for mutant in mutants(good, 10_000, 7):
            headers = {name: value.encode("latin-1") for name, value in mutant.headers.items()}
            answer = client.request(mutant.method, mutant.path, content=mutant.body, headers=headers)
            statuses[answer.status_code] += 1
            if answer.status_code == 200:
                answered.add(mutant.path)
            assert answer.status_code < 500, (mutant.path, mutant.body[:500], answer.text[:500])
        assert embedding(client) == before
        assert client.get("/ready").status_code == 200
    # Else nothing but the first check of each route was reached.
    assert statuses[200] > 150, statuses
    assert len(answered) > 20, answered
    assert "Traceback" not in logs(fuzzed)
    assert ": ERROR " not in logs(fuzzed)


def test_https_is_spoken_with_a_certificate_of_ones_own(tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("embeddings.example", "127.0.0.1")
    chain = tmp_path / "own.pem"
    certificate.cert_chain_pems[0].write_to_path(chain)
    key = load_pem_private_key(certificate.private_key_pem.bytes(), None)
    secret = BestAvailableEncryption(b"a-password")
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret))
    settings = {"CERT_FILE": chain, "KEY_FILE": tmp_path / "key.pem", "KEY_PASSWORD": "a-password"}
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    with serve(
        tmp_path / "output", **{f"GATEWAY_TLS_{name}": str(value) for name, value in settings.items()}
    ) as running:
        # Who never finishes the handshake is cut off.
        host, port = running.url.removeprefix("http://").split(":")
        silent = socket.create_connection((host, int(port)), timeout=60)
        came = time.monotonic()
        assert "ready at https://localhost:" in running.output.read_text()
        url = running.url.replace("http://", "https://")
        body = json.dumps({"input": "Hello"}).encode()
        request = urllib.request.Request(f"{url}/v1/embeddings", body)
        with urllib.request.urlopen(request, context=trusted, timeout=100) as answer:
            assert len(json.load(answer)["data"][0]["embedding"]) == 384
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{running.url}/health")
        assert silent.recv(1) == b""
        assert time.monotonic() - came < 40, "a control: the loop's own time is a minute"
        tell(f"\na client that never began its handshake was cut off after {time.monotonic() - came:.1f} s")
        silent.close()


def test_what_cannot_be_used_stops_serve_before_anything_starts(tmp_path):
    (tmp_path / "keys.json").write_text('[{"name": "a", "sha256": "sk-a-plain-key"}]')
    (tmp_path / "broken.pem").write_text("no certificate")
    for setting, value, told in (
        ("GATEWAY_API_KEYS_FILE", tmp_path / "keys.json", "entry 0 (a): sha256 is no hash"),
        ("GATEWAY_API_KEYS_FILE", tmp_path / "none.json", "cannot be read: No such file or directory"),
        ("GATEWAY_API_KEY", "", "GATEWAY_API_KEY cannot be a key"),
        ("GATEWAY_API_KEY", "two words here", "GATEWAY_API_KEY cannot be a key"),
        ("GATEWAY_TLS_CERT_FILE", tmp_path / "broken.pem", "cannot be used"),
        ("GATEWAY_TLS_KEY_FILE", tmp_path / "broken.pem", "give both"),
    ):
        done = subprocess.run(
            [COMMAND, "serve", "--port", "0", "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"],
            env={**os.environ, setting: str(value)},
            capture_output=True,
            text=True,
            cwd=Path("/"),
            timeout=100,
            check=False,
        )
        assert done.returncode == 1, setting
        assert told in done.stderr
        assert "sk-a-plain-key" not in done.stderr
        assert "two words here" not in done.stderr
