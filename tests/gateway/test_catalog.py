"""Which model a request means."""

import asyncio
import dataclasses
import gc
import time

import pytest

from backends.contract import Task
from gateway.catalog import Catalog
from gateway.context import RequestContext, enter
from gateway.errors import TimedOut, Unavailable, UnknownModel
from tests.support.fake_inference import PIPELINE, FakeInference

HUB = dataclasses.replace(
    PIPELINE,
    name="Qwen3-Embedding-4B",
    served_model_name="Qwen3-Embedding-4B",
    checkpoint="hub:Qwen/Qwen3-Embedding-4B@5f1c",
)
GME = dataclasses.replace(
    PIPELINE,
    name="gme-2b",
    served_model_name="gme-2b",
    checkpoint="/models/gme",
    chat_template="gme-qwen2-vl",
)
# Its own name is what another is called besides.
NAMED = dataclasses.replace(PIPELINE, name="x", served_model_name="/models/gme", checkpoint="/models/other")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("Qwen3-Embedding-4B", HUB),
        ("Qwen/Qwen3-Embedding-4B", HUB),
        ("gme-2b", GME),
        ("gme-qwen2-vl", GME),
        ("/models/gme", NAMED),
        ("/models/other", NAMED),
    ],
)
async def test_names_and_what_clients_call_models_besides(asked, found):
    catalog = Catalog(FakeInference([HUB, GME, NAMED]))
    assert await catalog.find(asked, Task.EMBED) == found


@pytest.mark.parametrize(
    "asked", ["qwen3", "hub:Qwen/Qwen3-Embedding-4B@5f1c", "Qwen/Qwen3-Embedding-4B@5f1c"]
)
async def test_others_are_unknown(asked):
    with pytest.raises(UnknownModel, match="does not exist here; there are: Qwen3-Embedding-4B, gme-2b"):
        await Catalog(FakeInference([HUB, GME, NAMED])).find(asked)


class _Slow(FakeInference):
    """Lists its models when it is told to, and counts how often."""

    def __init__(self):
        super().__init__([HUB])
        self.looks = 0
        self.may_answer = asyncio.Event()

    async def pipelines(self):
        self.looks += 1
        await self.may_answer.wait()
        return await super().pipelines()


async def ask(catalog, count, error):
    async def one():
        with pytest.raises(error):
            await catalog.find("nobody")

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())


async def test_of_many_who_miss_a_model_one_looks():
    inference = _Slow()
    inference.may_answer.set()
    catalog = Catalog(inference)
    await ask(catalog, 20, UnknownModel)
    assert inference.looks == 1


async def test_looks_are_not_many_where_they_fail_either():
    inference = _Slow()
    inference.may_answer.set()
    inference.fault = Unavailable("the server is gone")
    catalog, begun = Catalog(inference), time.monotonic()
    for _ in range(3):
        await ask(catalog, 20, Unavailable)
    assert inference.looks == 3
    assert time.monotonic() - begun > 0.2, "a tenth of a second between them"


async def test_a_model_that_was_added_a_moment_ago_is_found():
    inference = FakeInference([HUB])
    catalog = Catalog(inference)
    await catalog.refresh()
    inference.known = [HUB, GME]
    assert await catalog.find("gme-2b") == GME


async def test_who_refreshes_gets_a_look_that_began_after_that():
    inference = _Slow()
    catalog = Catalog(inference)
    waiting = [asyncio.create_task(catalog.refresh()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting += [asyncio.create_task(catalog.refresh()) for _ in range(20)]
    waiting[0].cancel()
    await asyncio.sleep(0)
    inference.known = [GME]
    inference.may_answer.set()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert answers[1:] == [[GME]] * 22
    assert inference.looks == 2


async def test_nobody_waits_for_a_look_beyond_the_deadline():
    enter(RequestContext("id", deadline=time.monotonic() + 0.05, time_limit="0.05 s, its timeout"))
    with pytest.raises(TimedOut, match=r"within 0\.05 s, its timeout; give it more time"):
        await Catalog(_Slow()).find("nobody")


async def test_at_the_deadline_what_is_known_counts():
    inference = _Slow()
    inference.may_answer.set()
    catalog = Catalog(inference)
    await catalog.refresh()
    inference.may_answer.clear()
    enter(RequestContext("id", deadline=time.monotonic() + 0.05, time_limit="0.05 s, its timeout"))
    with pytest.raises(UnknownModel, match="there are: Qwen3-Embedding-4B"):
        await catalog.find("nobody")


async def test_a_look_that_fails_after_all_have_left_is_not_logged_as_a_fault_of_ours():
    inference = _Slow()
    inference.fault = Unavailable("the server is gone")
    catalog, faults = Catalog(inference), []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: faults.append(context["message"]))
    waiting = asyncio.create_task(catalog.refresh())
    while not inference.looks:
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    inference.may_answer.set()
    await asyncio.wait([catalog._listing])
    # The error knows its frames, and these know the catalog.
    del catalog, waiting, inference
    gc.collect()
    assert faults == []
