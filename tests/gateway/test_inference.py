"""The parts of the way to the server that need no server; tests/server has the rest."""

import asyncio
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException, deserialize_bytes_tensor

from backends.contract import (
    DENSE,
    IMAGE_GRID,
    N_TOKENS,
    SPARSE_COUNT,
    SPARSE_INDICES,
    TEXT,
    TOKEN_VECTORS,
    VECTOR_COUNT,
    ErrorCode,
)
from gateway import server_calls
from gateway.batches import Content, cut
from gateway.context import RequestContext, enter
from gateway.errors import AnswerTooLarge, ModelLost, RefusedItem, ServerFault, TimedOut, Unavailable
from gateway.inference import GrpcInference
from gateway.pipeline import read_pipeline
from gateway.server_errors import explain
from tests.support.fake_inference import MULTIMODAL, PIPELINE


@pytest.mark.parametrize(
    ("status", "message", "kind", "text"),
    [
        ("INVALID_ARGUMENT", "in ensemble 'a', invalid_input at item 3: bad", RefusedItem, "bad"),
        (
            "INTERNAL",
            "in ensemble 'a', internal: the model failed",
            ServerFault,
            "the server's log tells why",
        ),
        ("INTERNAL", "Stub process 'a.encoder_0_0' is not healthy.", ModelLost, "m does not answer"),
        (
            "INTERNAL",
            "in ensemble 'a', Failed to increase the shared memory pool size for key 'k' to 1 bytes.",
            Unavailable,
            "more of it with --shm-size",
        ),
        ("UNAVAILABLE", "failed to connect to all addresses", ModelLost, "cannot be reached"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", TimedOut, "within 2.5 s"),
        ("NOT_FOUND", "Request for unknown model: 'a' is not found", ModelLost, "m is not loaded"),
        ("UNKNOWN", "secret detail", ServerFault, "the server's log tells why"),
    ],
)
def test_statuses_of_the_server(status, message, kind, text):
    error = explain(InferenceServerException(message, f"StatusCode.{status}"), "m", 2.5)
    assert type(error) is kind
    assert text in error.message
    assert "secret" not in error.message
    if isinstance(error, RefusedItem):
        assert (error.item, error.reason) == (3, ErrorCode.INVALID_INPUT)


class CannedInference(GrpcInference):
    """Answers of the server as it would pack them: an item of n bytes has n values, all of them n."""

    def __init__(self, max_answer_bytes=10**6):
        super().__init__(["127.0.0.1:9"], 1, max_answer_bytes)
        self.calls.ask = self._answer
        self.running = 0
        self.most = 0
        self.asked = []

    async def _answer(self, pipeline, model, given, outputs, parameters):
        self.asked.append((model, tuple(outputs)))
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        counts = np.array([[sum(map(len, row))] for row in given[TEXT]], np.int32)
        values = np.repeat(counts[:, 0], counts[:, 0]).astype(np.float32)
        packed = {SPARSE_INDICES: values[None], TOKEN_VECTORS: np.stack([values, values], 1)[None]}
        rows = {
            SPARSE_COUNT: counts,
            VECTOR_COUNT: counts,
            N_TOKENS: counts,
            DENSE: counts.astype(np.float32),
        }
        return {name: {**packed, **rows}[name] for name in outputs}


async def test_answers_of_several_server_requests_come_back_in_order():
    inference = CannedInference()
    sizes = [5, 0, 3, 9, 1, 1, 7, 2, 0, 4]
    items = [b"x" * n for n in sizes]
    answer = await inference.infer(PIPELINE, items, [SPARSE_INDICES, DENSE], {})
    assert len(inference.asked) > 2
    assert inference.asked[0] == ("tiny", (SPARSE_INDICES, DENSE, SPARSE_COUNT)), "the count is asked for too"
    assert [piece.tolist() for piece in answer[SPARSE_INDICES]] == [[float(n)] * n for n in sizes]
    assert answer[DENSE][:, 0].tolist() == sizes
    assert set(answer) == {SPARSE_INDICES, DENSE}
    await inference.infer(PIPELINE, [b"a"], [N_TOKENS], {}, stage="tokenizer")
    assert inference.asked[-1] == ("tiny.tokenizer", (N_TOKENS,))


async def test_large_answers_are_asked_for_a_few_at_a_time():
    inference = CannedInference()
    items = [b"x"] * 40
    await inference.infer(PIPELINE, items, [DENSE], {})
    assert inference.most == 10
    inference.most = 0
    await inference.infer(PIPELINE, items, [TOKEN_VECTORS], {})
    assert inference.most == 4


async def test_an_answer_over_the_limit_is_refused_before_all_of_it_is_there():
    inference = CannedInference(max_answer_bytes=1000)
    items = [b"x" * 12] * 40
    with pytest.raises(AnswerTooLarge, match="more than 1000 bytes of numbers; send fewer or shorter"):
        await inference.infer(PIPELINE, items, [TOKEN_VECTORS], {})
    assert len(inference.asked) < 8


class CannedClient:
    """A client of the server that keeps what it was asked, and answers with the item's number of bytes."""

    def __init__(self, fault=None):
        self.asked = []
        self.fault = fault

    async def infer(self, model, inputs, *, outputs, parameters, **options):
        given = {
            tensor.name(): deserialize_bytes_tensor(tensor._get_content()).reshape(tensor.shape()).tolist()
            for tensor in inputs
        }
        self.asked.append((model, given, parameters))
        if self.fault is not None and model == self.fault[0]:
            raise InferenceServerException(self.fault[1], "StatusCode.INVALID_ARGUMENT")
        rows = next(iter(given.values()))
        answer = {
            N_TOKENS: [[sum(map(len, row))] for row in rows],
            IMAGE_GRID: [[[1, 1, 1]]] * len(rows),
        }
        return SimpleNamespace(as_numpy=lambda name: np.array(answer[name], np.int32))

    async def close(self):
        pass


@pytest.fixture
async def canned():
    inference = GrpcInference(["127.0.0.1:9"], 1, 10**6)
    await inference.servers[0].close()
    inference.servers[0].client = CannedClient()
    return inference


MIXED = [b"text", Content(b"", (b"1",)), b"more", Content(b"both", (b"2", b"3"))]


async def test_texts_pass_no_image_stage_and_images_do(canned):
    answer = await canned.infer(MULTIMODAL, MIXED, [N_TOKENS], {"role": "query"})
    assert answer[N_TOKENS][:, 0].tolist() == [4, 0, 4, 4]
    assert canned.servers[0].client.asked == [
        ("gme", {"text": [[b"text"], [b"more"]]}, {"role": "query"}),
        (
            "gme.multimodal",
            {"text": [[b""], [b"both"]], "image": [[b"1", b""], [b"2", b"3"]]},
            {"role": "query"},
        ),
    ]


async def test_a_refused_image_has_its_place_in_the_clients_list(canned):
    canned.servers[0].client.fault = (
        "gme.multimodal",
        "in ensemble 'gme.multimodal', invalid_image at item 1: no picture",
    )
    with pytest.raises(RefusedItem, match="no picture") as caught:
        await canned.infer(MULTIMODAL, MIXED, [N_TOKENS], {})
    assert (caught.value.item, caught.value.reason) == (3, ErrorCode.INVALID_IMAGE)
    assert caught.value.explain("input") == "input[3]: no picture"
    assert caught.value.blame("input") == "input"


async def test_the_image_stage_alone(canned):
    await canned.infer(MULTIMODAL, [Content(b"", (b"1",))], [IMAGE_GRID], {}, stage="image")
    assert canned.servers[0].client.asked == [("gme.image", {"image": [[b"1"]]}, None)]


async def test_the_last_success_is_that_of_texts_and_of_images(canned):
    text, image = [b"text"], [Content(b"", (b"1",))]
    await canned.infer(MULTIMODAL, text, [N_TOKENS], {})
    assert canned.last_success(MULTIMODAL) is None, "of its images nothing is known"
    assert canned.last_success(dataclasses.replace(MULTIMODAL, takes_images=False)) is not None
    await canned.infer(MULTIMODAL, image, [IMAGE_GRID], {}, stage="image")
    await canned.infer(MULTIMODAL, text, [N_TOKENS], {})
    first = canned.last_success(MULTIMODAL)
    await canned.infer(MULTIMODAL, text, [N_TOKENS], {})
    assert canned.last_success(MULTIMODAL) == first, "texts say nothing of the image stage"
    await canned.infer(MULTIMODAL, image, [N_TOKENS], {})
    assert canned.last_success(MULTIMODAL) > first, "such a request passes all stages"


async def test_images_are_sent_a_few_at_a_time():
    inference = CannedInference()
    await inference.infer(MULTIMODAL, [b"x"] * 40, [DENSE], {})
    assert inference.most == 10
    inference.most = 0
    await inference.infer(MULTIMODAL, [Content(b"", (b"x",))] * 40, [DENSE], {})
    assert inference.most == 4


async def test_images_of_all_clients_together_are_a_few_at_a_time():
    inference = CannedInference()
    images = [Content(b"", (b"x",))] * 40
    await asyncio.gather(*(inference.infer(MULTIMODAL, images, [DENSE], {}) for _ in range(5)))
    assert inference.most == 8
    inference.most = 0
    await asyncio.gather(*(inference.infer(MULTIMODAL, [b"x"], [DENSE], {}) for _ in range(20)))
    assert inference.most == 20, "texts do not wait for a turn"


def test_what_the_server_says_of_a_model_of_images():
    def config(**parameters):
        given = {"tasks": "embed", "max_length": "16", "max_batch_tokens": "64"} | parameters
        message = model_config_pb2.ModelConfig(name="a", max_batch_size=4)
        for name, value in given.items():
            message.parameters[name].string_value = value
        return message

    text = read_pipeline(config())
    assert (text.takes_images, text.fuses, text.max_image_tokens) == (False, False, 0)
    both = read_pipeline(config(modalities="text,image", fuses="true", max_image_tokens="1280"))
    assert (both.takes_images, both.fuses, both.max_image_tokens) == (True, True, 1280)


async def test_a_server_that_stands_still_does_not_hold_up_the_list_of_another(monkeypatch):
    monkeypatch.setattr(server_calls, "_OTHERS_LIST_TIMEOUT_S", 0.05)
    two = GrpcInference(["a:1", "b:1"], 300, 2**20)
    monkeypatch.setattr(two.servers[0], "pipelines", lambda *_: asyncio.Event().wait())
    monkeypatch.setattr(two.servers[1], "pipelines", lambda *_: asyncio.sleep(0.2, [PIPELINE]))
    assert await two.pipelines() == [PIPELINE]
    await two.close()


async def test_a_model_has_as_many_budgets_as_servers_answer_for_it():
    two = GrpcInference(["a:1", "b:1"], 300, 2**20)
    enter(RequestContext("r"))

    def budgets():
        with two._enter(PIPELINE, [b"text"], cut([b"text"], PIPELINE), [], None):
            return two.admission._queues[PIPELINE.name].servers

    assert budgets() == 2
    two.availability.lose("a:1", PIPELINE.name, "it died")
    assert budgets() == 1
    two.availability.lose("b:1", PIPELINE.name, "it died")
    assert budgets() == 1, "who waits for one that comes back is let in"
    two.availability.regain("a:1", PIPELINE.name)
    two.availability.regain("b:1", PIPELINE.name)
    assert budgets() == 2
    await two.close()
