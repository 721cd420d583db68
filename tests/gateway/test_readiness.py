import asyncio
import dataclasses
import io

from PIL import Image

from gateway.batches import Content
from gateway.errors import Unavailable
from tests.gateway.conftest import running
from tests.support.fake_inference import MULTIMODAL, PIPELINE, FakeInference


async def until(client, status, reason=""):
    """The first answer of that status and reason; the test's own time limit ends a wait in vain."""
    while True:
        answer = await client.get("/ready")
        if answer.status_code == status and reason in (answer.json()["reason"] or ""):
            return answer.json()
        await asyncio.sleep(0.01)


async def test_ready_after_a_real_inference_of_every_model():
    other = dataclasses.replace(PIPELINE, name="other", served_model_name="other")
    inference = FakeInference([PIPELINE, other])
    inference.release.clear()
    async with running(inference, canary_interval_s=0.1) as client:
        body = await until(client, 503)
        assert body["status"] == "not ready"
        inference.release.set()
        body = await until(client, 200)
    assert body["models"] == {
        name: {"ready": True, "reason": None, "has_failed": False} for name in ("org/tiny", "other")
    }
    assert {items[0] for items, _ in inference.calls} == {b"ready?"}


async def test_a_model_that_stops_answering_is_named_and_comes_back():
    inference = FakeInference()
    async with running(inference, canary_interval_s=0.05) as client:
        await until(client, 200)
        inference.fault = Unavailable("the model is gone")
        # Both the list of models and the model itself fail.
        body = await until(client, 503)
        assert body["reason"] == "the model is gone"
        assert not body["models"]["org/tiny"]["ready"]
        assert (await client.get("/health")).status_code == 200
        inference.fault = None
        await until(client, 200)


async def test_an_unexpected_error_does_not_end_the_watch():
    inference = FakeInference()
    known = inference.pipelines

    async def explode():
        raise ZeroDivisionError("secret")

    inference.pipelines = explode
    async with running(inference, canary_interval_s=0.05) as client:
        body = await until(client, 503, "unexpected")
        assert "secret" not in body["reason"]
        inference.pipelines = known
        await until(client, 200)


async def test_a_model_that_hangs_does_not_hold_up_the_others():
    other = dataclasses.replace(PIPELINE, name="other", served_model_name="other")
    inference = FakeInference([PIPELINE, other])
    answer = inference.infer

    async def infer(pipeline, *rest):
        if pipeline is PIPELINE:
            await asyncio.Event().wait()
        return await answer(pipeline, *rest)

    inference.infer = infer
    async with running(inference, canary_interval_s=0.05, patience_s=0.2) as client:
        while (body := await until(client, 503))["models"] == {}:
            await asyncio.sleep(0.01)
        while not (body := await until(client, 503))["models"]["other"]["ready"]:
            await asyncio.sleep(0.01)
        while "no answer in 0.2 s" not in str(body["models"]["org/tiny"]["reason"]):
            await asyncio.sleep(0.01)
            body = await until(client, 503)
    assert body["models"]["other"] == {"ready": True, "reason": None, "has_failed": False}


async def test_two_models_of_one_name_are_not_ready_when_one_of_them_fails():
    twin = dataclasses.replace(PIPELINE, name="twin")
    inference = FakeInference([PIPELINE, twin])
    answer = inference.infer

    async def infer(pipeline, *rest):
        if pipeline is PIPELINE:
            raise Unavailable("dead")
        return await answer(pipeline, *rest)

    inference.infer = infer
    async with running(inference, canary_interval_s=0.05) as client:
        while (await until(client, 503))["models"].get("org/tiny", {}).get("reason") != "dead":
            await asyncio.sleep(0.01)


async def test_only_the_model_fails():
    inference = FakeInference()

    async def known():
        return [PIPELINE]

    inference.pipelines = known
    async with running(inference, canary_interval_s=0.05) as client:
        await until(client, 200)
        inference.fault = Unavailable("its process died")
        body = await until(client, 503)
    assert body["reason"] is None
    assert body["models"] == {"org/tiny": {"ready": False, "reason": "its process died", "has_failed": True}}


async def test_a_dead_image_stage_is_noticed_beside_texts_that_answer():
    inference = FakeInference([MULTIMODAL, PIPELINE])
    answer = inference.infer
    is_dead = False

    async def infer(pipeline, items, outputs, parameters, stage=None):
        if is_dead and stage == "image":
            raise Unavailable("its image stage died")
        return await answer(pipeline, items, outputs, parameters, stage)

    inference.infer = infer
    async with running(inference, canary_interval_s=0.05) as client:
        await until(client, 200)
        images = [items[0] for items, _ in inference.calls if isinstance(items[0], Content)]
        assert Image.open(io.BytesIO(images[0].images[0])).convert("RGB").size == (1, 1)
        is_dead = True
        body = await until(client, 503)
        assert body["models"]["org/gme"] == {
            "ready": False,
            "reason": "its image stage died",
            "has_failed": True,
        }
        assert body["models"]["org/tiny"]["ready"]
        is_dead = False
        await until(client, 200)


async def test_a_server_without_models_is_not_ready():
    async with running(FakeInference([])) as client:
        await until(client, 503, "add one with: triton-embeddings add")
        answer = await client.post("/v1/embeddings", json={"input": "a"})
    assert answer.status_code == 503
    assert "no model is loaded yet" in answer.json()["error"]["message"]


async def test_traffic_spares_the_canary():
    inference = FakeInference()
    async with running(inference, canary_interval_s=3600) as client:
        await until(client, 200)
        await client.post("/v1/embeddings", json={"input": "a"})
    assert [items[0] for items, _ in inference.calls] == [b"ready?", b"a"]


async def test_a_model_added_later_is_found_at_once():
    inference = FakeInference([])
    async with running(inference, canary_interval_s=0.02) as client:
        await until(client, 503)
        inference.known = [PIPELINE]
        await until(client, 200)
        assert (await client.post("/v1/embeddings", json={"input": "a"})).status_code == 200
    assert inference.is_closed
