"""The parts of the way to the server that need no server; tests/server has the rest."""

import asyncio
import dataclasses

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from backends.contract import (
    DENSE,
    N_TOKENS,
    SPARSE_COUNT,
    SPARSE_INDICES,
    TOKEN_VECTORS,
    VECTOR_COUNT,
    ErrorCode,
)
from gateway.errors import AnswerTooLarge, RefusedItem, ServerFault, TimedOut, Unavailable
from gateway.inference import GrpcInference, _cut
from tests.support.fake_inference import PIPELINE


@pytest.mark.parametrize("count", [1, 4, 5, 11])
def test_cuts_are_within_the_batch_size_and_complete(count):
    items = [b"x" * (i * 7 % 5) for i in range(count)]
    parts = _cut(items, PIPELINE)
    assert sorted(i for part in parts for i in part) == list(range(count))
    assert all(len(part) <= 4 for part in parts)
    if count > 4:
        sizes = [len(items[i]) for part in parts for i in part]
        assert sizes == sorted(sizes), "items of about one size share a server request"


def test_cuts_are_within_the_token_budget():
    pipeline = dataclasses.replace(PIPELINE, max_batch_tokens=20)
    items = [b"x" * n for n in (4, 4, 4, 4, 1000, 4)]
    # 4 tokens each by their bytes, and 16 for the one over the model's limit.
    assert _cut(items, pipeline) == [[0, 1, 2, 3], [5, 4]]
    assert _cut([b"x" * 1000] * 3, pipeline) == [[0], [1], [2]]


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
        ("INTERNAL", "Stub process 'a.encoder_0_0' is not healthy.", Unavailable, "m does not answer"),
        ("UNAVAILABLE", "failed to connect to all addresses", Unavailable, "cannot be reached"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", TimedOut, "within 2.5 s"),
        ("NOT_FOUND", "Request for unknown model: 'a' is not found", Unavailable, "m is not loaded"),
        ("UNKNOWN", "secret detail", ServerFault, "the server's log tells why"),
    ],
)
async def test_statuses_of_the_server(status, message, kind, text):
    inference = GrpcInference("127.0.0.1:9", 2.5, 1000)
    error = inference._explain(InferenceServerException(message, f"StatusCode.{status}"), "m")
    await inference.close()
    assert type(error) is kind
    assert text in error.message
    assert "secret" not in error.message
    if isinstance(error, RefusedItem):
        assert (error.item, error.reason) == (3, ErrorCode.INVALID_INPUT)


class CannedInference(GrpcInference):
    """Answers of the server as it would pack them: an item of n bytes has n values, all of them n."""

    def __init__(self, max_answer_bytes=10**6):
        super().__init__("127.0.0.1:9", 1, max_answer_bytes)
        self.running = 0
        self.most = 0
        self.asked = []

    async def _infer_part(self, pipeline, model, items, outputs, parameters):
        self.asked.append((model, tuple(outputs)))
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        counts = np.array([[len(item)] for item in items], np.int32)
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
