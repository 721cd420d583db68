"""Which model a request means."""

import dataclasses

import pytest

from backends.contract import Task
from gateway.catalog import Catalog
from gateway.errors import UnknownModel
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
