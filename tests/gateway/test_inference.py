"""The parts of the way to the server that need no server; tests/server has the rest."""

import dataclasses

import pytest
from tritonclient.utils import InferenceServerException

from backends.contract import ErrorCode
from gateway.errors import RefusedItem, ServerFault, TimedOut, Unavailable
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
