"""What /metrics tells, over a stand-in for the inference server."""

import asyncio
import logging

import aiohttp.web
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway import metrics
from gateway.admission import AdmissionState
from gateway.context import Lane
from gateway.errors import Unavailable
from gateway.lane import LaneState
from gateway.metrics import show_load
from gateway.server_metrics import merge
from tests.gateway.conftest import running
from tests.support.fake_inference import FakeInference
from tests.support.gateway import listening


async def scrape(client):
    """Sample name and labels -> value."""
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == metrics.CONTENT_TYPE
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def requests(found, route, model, status):
    labels = (("model", model), ("route", route), ("status", str(status)))
    return found.get(("triton_embeddings_requests_total", *labels), 0)


NO_LANE = ("lane", "none")
EMBEDDINGS = ("route", "/v1/embeddings")


async def test_requests_are_counted_by_template_model_and_status(client):
    before = await scrape(client)
    await client.post("/v1/embeddings", json={"input": ["a", "b" * 17]})
    await client.post("/v1/embeddings", json={"input": "a", "model": "nobody's"})
    await client.get("/v1/models/org/tiny")
    await client.get("/no/such/path")
    after = await scrape(client)

    def grown(*what):
        return requests(after, *what) - requests(before, *what)

    assert grown("/v1/embeddings", "org/tiny", 200) == 1
    assert grown("/v1/embeddings", "none", 404) == 1
    assert grown("/v1/models/{model:path}", "none", 200) == 1
    assert grown("other", "none", 404) == 1
    assert not any("nobody" in str(labels) or "such" in str(labels) for labels in after)
    of_model = ("model", "org/tiny")
    tokens = "triton_embeddings_tokens_total", of_model
    assert after[tokens] - before.get(tokens, 0) == 18
    cut = "triton_embeddings_truncated_inputs_total", of_model
    assert after[cut] - before.get(cut, 0) == 1
    durations = "triton_embeddings_request_duration_seconds_count", NO_LANE, of_model, EMBEDDINGS
    assert after[durations] - before.get(durations, 0) == 1


async def test_what_is_refused_at_the_door_is_counted_by_its_route(inference, caplog):
    settings = {"api_key": "sk-a-good-key", "admin_key": "the-operators-own", "access_log": True}
    caplog.set_level(logging.INFO, "gateway.access")
    with listening(inference, max_headers=20, metrics=True, **settings) as gateway:
        operator = {"Authorization": "Bearer the-operators-own"}
        async with httpx.AsyncClient(base_url=gateway.url, headers=operator) as client:
            before = await scrape(client)
            stranger = {"Authorization": "Bearer sk-unknown"}
            await client.post("/v1/embeddings", json={"input": "a"}, headers=stranger)
            await client.get("/v1/models/org/tiny", headers=stranger)
            await client.delete("/admin/models/tiny", headers=stranger)
            await client.post("/v1/rerank", json={}, headers={f"x-{i}": "a" for i in range(30)})
            await client.post("/nowhere", json={}, headers=stranger)
            after = await scrape(client)
    for route, status in (
        ("/v1/embeddings", 401),
        ("/v1/models/{model:path}", 401),
        ("/admin/models/{name}", 401),
        ("/v1/rerank", 431),
        ("other", 401),
    ):
        assert requests(after, route, "none", status) - requests(before, route, "none", status) == 1, route
    assert any(record.message.startswith("POST /v1/embeddings 401") for record in caplog.records)


async def test_an_unexpected_error_is_counted(inference, client):
    before = await scrape(client)
    inference.fault = ZeroDivisionError()
    assert (await client.post("/v1/embeddings", json={"input": "a"})).status_code == 500
    after = await scrape(client)
    what = "/v1/embeddings", "org/tiny", 500
    assert requests(after, *what) - requests(before, *what) == 1


async def test_an_answer_says_what_its_time_was_spent_on(client):
    answer = await client.post("/v1/embeddings", json={"input": "a"})
    names = [part.split(";")[0] for part in answer.headers["server-timing"].split(", ")]
    assert names == ["receive", "serialise", "total"]
    assert "server-timing" in (await client.get("/health")).headers


async def test_the_state_of_a_model_and_of_the_server():
    inference = FakeInference()
    known = inference.pipelines
    async with running(inference, canary_interval_s=0.05) as client:

        async def until(model, server):
            while True:
                found = await scrape(client)
                state = found.get(("triton_embeddings_model_up", ("model", "org/tiny")))
                if (state, found["triton_embeddings_server_up",]) == (model, server):
                    return
                await asyncio.sleep(0.05)

        await until(1, 1)
        inference.fault = Unavailable("gone")
        await until(0, 0)
        inference.pipelines = known
        inference.fault = None
        await until(1, 1)


async def test_what_admission_knows(client):
    def load(rejected):
        lanes = {lane: LaneState(7, 100, 50, 2, rejected, 1) for lane in Lane}
        return AdmissionState("org/tiny", lanes, 5, 9.5)

    show_load(load(3), None)
    show_load(load(5), load(3))
    found = await scrape(client)
    model = ("model", "org/tiny")
    lane = ("lane", "interactive"), model
    assert found["triton_embeddings_queued_tokens", *lane] == 7
    assert found["triton_embeddings_queued_tokens_limit", *lane] == 100
    assert found["triton_embeddings_queued_requests", *lane] == 2
    assert found["triton_embeddings_rejected_requests_total", *lane, ("reason", "busy")] == 5
    assert found["triton_embeddings_expired_requests_total", *lane] == 1
    assert found["triton_embeddings_in_flight_tokens", model] == 5
    assert found["triton_embeddings_admission_tokens_per_second", model] == 9.5


NV = """# HELP nv_count Requests
# TYPE nv_count counter
nv_count{model="a b",version="1"} 3
# HELP nv_total Bytes
# TYPE nv_total gauge
nv_total 5
"""


def test_the_numbers_of_two_servers_stand_side_by_side():
    merged = merge({"a:1": NV, "b:2": NV})
    assert merged.count("# TYPE nv_count counter") == 1
    families = {family.name: family for family in text_string_to_metric_families(merged)}
    assert [s.labels for s in families["nv_count"].samples] == [
        {"server": server, "model": "a b", "version": "1"} for server in ("a:1", "b:2")
    ]
    assert [s.value for s in families["nv_total"].samples] == [5, 5]


@pytest.mark.parametrize("status", [200, 500])
async def test_the_servers_own_numbers_and_without_them_the_gateways(unused_tcp_port, status):
    async def answer(request):
        return aiohttp.web.Response(text=NV, status=status)

    app = aiohttp.web.Application()
    app.router.add_get("/metrics", answer)
    runner = aiohttp.web.AppRunner(app)
    await runner.setup()
    site = aiohttp.web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    servers = f"127.0.0.1:{port}, 127.0.0.1:{unused_tcp_port}"
    try:
        async with running(FakeInference(), server_metrics=servers) as client:
            found = await scrape(client)
    finally:
        await runner.cleanup()
    assert ("triton_embeddings_server_up",) in found
    own = ("nv_total", ("server", f"127.0.0.1:{port}"))
    assert found.get(own) == (5 if status == 200 else None)


async def test_a_line_for_each_request_where_that_is_wanted(caplog):
    for wanted in (False, True):
        caplog.clear()
        async with running(FakeInference(), access_log=wanted) as client:
            await client.post("/v1/embeddings", json={"input": "secret"})
        lines = [r for r in caplog.records if r.name == "gateway.access"]
        assert len(lines) == wanted
    assert lines[0].levelno == logging.INFO
    assert lines[0].getMessage().startswith("POST /v1/embeddings 200 ")
    assert lines[0].status == 200
