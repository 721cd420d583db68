"""Everything that a stranger may send: no answer says that the fault is here, and no log has a traceback."""

import asyncio
import collections
import contextlib
import logging

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from gateway import live_command
from gateway.app import create_app
from gateway.settings import Settings
from tests.gateway.conftest import running
from tests.support.fake_inference import CLASSIFIER, KINDS, MULTIMODAL, RERANKER, FakeInference
from tests.support.mutations import good_bodies, mutants

# The ten thousand are for the real server, tests/server/test_strangers.py.
COUNT = 4_000
MODELS = [KINDS, RERANKER, CLASSIFIER, MULTIMODAL]
DOCUMENT = create_app(Settings(), FakeInference()).openapi()
GOOD = {"input": ["Hello, world", "Good morning"]}


def no_traceback(caplog):
    return [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]


@pytest.mark.parametrize("seed", range(4))
async def test_mutated_bodies_are_the_clients_fault(seed, caplog):
    good = good_bodies(DOCUMENT)
    statuses = collections.Counter()
    async with running(FakeInference(MODELS), max_body_bytes=200_000) as client:
        before = (await client.post("/v1/embeddings", json=GOOD)).json()
        for mutant in mutants(good, COUNT // 4, seed):
            answer = await client.request(
                mutant.method,
                mutant.path,
                content=mutant.body,
                headers={name: value.encode("latin-1") for name, value in mutant.headers.items()},
            )
            statuses[answer.status_code] += 1
            assert answer.status_code < 500, (mutant.path, mutant.body[:300], answer.text[:300])
            assert len(answer.content) < 100_000 or answer.status_code == 200, (
                "an error repeats what was sent"
            )
        assert (await client.post("/v1/embeddings", json=GOOD)).json() == before
    assert no_traceback(caplog) == []
    # Else nothing but the first check of each route was reached.
    assert statuses[200] > COUNT // 40, statuses
    assert statuses[400] > COUNT // 40, statuses


async def test_mutated_changes_of_models_run_no_other_command(monkeypatch, caplog):
    ran = []

    async def run_one(arguments):
        ran.append(arguments)
        return "done"

    monkeypatch.setattr(live_command, "_run_one", run_one)
    key = "the-operators-own-key"
    document = create_app(Settings(admin_key=key), FakeInference()).openapi()
    good = {path: bodies for path, bodies in good_bodies(document).items() if path.startswith("/admin")}
    assert good
    good["/admin/models"] += [{"checkpoint": "a"}, {"checkpoint": "a", "options": {"fuse_heads": True}}]
    statuses = collections.Counter()
    async with running(FakeInference(MODELS), admin_key=key, server="127.0.0.1:1") as client:
        for mutant in mutants(good, 1000, 3):
            headers = {name: value.encode("latin-1") for name, value in mutant.headers.items()}
            headers["x-api-key"] = key.encode()
            answer = await client.request(mutant.method, mutant.path, content=mutant.body, headers=headers)
            statuses[answer.status_code] += 1
            assert answer.status_code < 500, (mutant.body[:300], answer.text[:300])
        for name in ("--live", "..", "a/b", "%00", "é", "x" * 200):
            answer = await client.delete(f"/admin/models/{name}", headers={"x-api-key": key})
            assert answer.status_code < 500, (name, answer.text)
    assert no_traceback(caplog) == []
    assert min(statuses[200], statuses[400]) > 50, statuses
    for command, *arguments in ran:
        assert command in ("add", "remove")
        # What stands in a body is a value of the command line: a path, a name, or an option of `add`.
        flags = [one for one in arguments[1:] if one.startswith("-")]
        assert not arguments[0].startswith("-"), arguments
        assert not {"--trust-remote-code", "--model-repository"} & {flag.split("=")[0] for flag in flags}
        assert [flag for flag in flags if flag.startswith("--grpc-port")] == ["--grpc-port=1"]


def test_mutations_are_the_same_for_the_same_seed():
    good = good_bodies(DOCUMENT)
    assert list(mutants(good, 50, 1)) == list(mutants(good, 50, 1)) != list(mutants(good, 50, 2))


# What httpx calls what schemathesis has made for requests.
_SENT = {
    "method": "method",
    "url": "url",
    "json": "json",
    "data": "content",
    "headers": "headers",
    "params": "params",
}
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = [operation.ok() for operation in SCHEMA.get_all_operations()]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_what_the_description_allows_and_what_it_does_not_is_answered(operation, caplog):
    cases = []
    for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

        @settings(
            max_examples=12,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def collect(case):
            cases.append(case.as_transport_kwargs(base_url="http://gateway"))

        # Of a route that takes nothing there is nothing to do wrong.
        with contextlib.suppress(Unsatisfiable):
            collect()
    assert cases

    async def send():
        async with running(FakeInference(MODELS)) as client:
            for case in cases:
                known = {_SENT[k]: value for k, value in case.items() if k in _SENT and value is not None}
                answer = await client.request(**known)
                # /ready says with 503 that the models were not looked at yet.
                is_told = operation.path == "/ready" and answer.status_code == 503
                assert answer.status_code < 500 or is_told, (known, answer.text[:300])

    asyncio.run(send())
    assert no_traceback(caplog) == []
