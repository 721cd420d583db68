"""What the server's words mean, and the inputs of pings; tests/server has the real one."""

import pytest
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from gateway.inference_server import InferenceServer, Pulse, _empty_input, _is_being_mended


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("STRING", [1, 1, 4]),
        ("INT32", [1, 0, 4]),
        ("UINT8", [1, 0, 4]),
        ("FP32", [1, 0, 4]),
        ("FP16", [1, 0, 4]),
        ("BF16", [1, 0, 4]),
    ],
)
def test_every_type_of_tensor_has_a_smallest_input(kind, shape):
    tensor = _empty_input(model_config_pb2.ModelInput(name="x", data_type=f"TYPE_{kind}", dims=[-1, 4]))
    assert tensor.shape() == shape
    assert tensor._get_content() is not None


@pytest.mark.parametrize(
    ("status", "message", "pulse"),
    [
        ("INTERNAL", "Stub process 'a.encoder_0_0' is not healthy.", Pulse.DEAD),
        ("INTERNAL", "Failed to obtain the health mutex.", Pulse.DEAD),
        ("INTERNAL", "in ensemble 'a', internal: not well: a turn takes 90 s", Pulse.UNWELL),
        ("INTERNAL", "internal: the model failed on this request", Pulse.ALIVE),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", Pulse.SILENT),
        ("NOT_FOUND", "Request for unknown model: 'a.encoder' is not found", Pulse.MISSING),
        ("UNAVAILABLE", "Request for unknown model: 'a' has no available versions", Pulse.MISSING),
        ("UNAVAILABLE", "failed to connect to all addresses", Pulse.UNREACHABLE),
        ("INVALID_ARGUMENT", "unexpected shape for input 'text'", Pulse.ALIVE),
    ],
)
async def test_what_a_ping_learns_of_an_error(status, message, pulse):
    server = InferenceServer("127.0.0.1:9")
    assert server._read("a.encoder", InferenceServerException(message, f"StatusCode.{status}")) is pulse
    with pytest.raises(InferenceServerException):
        server._read("a.encoder", InferenceServerException("of the client alone"))
    await server.close()


@pytest.mark.parametrize(
    ("ensemble", "stages", "is_kept"),
    [
        ("UNAVAILABLE", ("READY", "LOADING"), True),
        ("UNAVAILABLE", ("READY", "UNAVAILABLE"), True),
        ("UNAVAILABLE", ("LOADING", "LOADING"), True),
        ("LOADING", ("READY", "READY"), True),
        ("UNAVAILABLE", ("READY", "READY"), False),
        ("UNAVAILABLE", ("UNAVAILABLE", "UNAVAILABLE"), False),
        ("", ("", ""), False),
    ],
)
def test_a_model_that_lacks_a_stage_stays_known_and_one_that_was_removed_does_not(ensemble, stages, is_kept):
    assert _is_being_mended(ensemble, stages) is is_kept


async def test_a_server_that_is_gone_tells_nothing_of_an_entry():
    server = InferenceServer("127.0.0.1:9")
    assert await server.state("a.encoder") is None
    assert await server.success_count(["a"]) is None
    await server.close()
