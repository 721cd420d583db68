"""What the server's words mean, and the inputs of pings; tests/server has the real one."""

import dataclasses
from types import SimpleNamespace

import pytest
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from gateway.inference_server import InferenceServer, Pulse, _empty_input, _is_being_mended
from tests.support.fake_inference import PIPELINE


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


class _Client:
    """A server that unloads entries between its list of them and their description."""

    def __init__(self, *looks, code="NOT_FOUND"):
        """Each: states by entry, and what is unloaded by the time that it is described."""
        self.looks = list(looks)
        self.error = InferenceServerException(
            "Request for unknown model: it is not found", f"StatusCode.{code}"
        )

    async def get_model_repository_index(self, client_timeout):
        states, self.lost = self.looks.pop(0)
        models = [SimpleNamespace(name=name, state=state, reason="") for name, state in states.items()]
        return SimpleNamespace(models=models)

    async def get_model_config(self, name, client_timeout):
        if name in self.lost:
            raise self.error
        parameters = {"tasks": "embed", "max_length": "16", "max_batch_tokens": "64"}
        config = model_config_pb2.ModelConfig(name=name, max_batch_size=4)
        for key, value in parameters.items() if name in ("m3", "other") else ():
            config.parameters[key].string_value = value
        return SimpleNamespace(config=config)


ALL = {"m3": "READY", "m3.encoder": "READY", "m3.dense": "READY", "other": "READY"}
MENDED = ALL | {"m3": "UNAVAILABLE", "m3.encoder": "LOADING"}
M3 = dataclasses.replace(PIPELINE, name="m3", steps=("m3.encoder", "m3.dense"))


@pytest.mark.parametrize(
    "looks",
    [
        pytest.param([(ALL, ())], id="nothing is unloaded"),
        pytest.param([(ALL, ("m3", "m3.encoder")), (MENDED, ())], id="a stage, and its model with it"),
        pytest.param([(ALL, ("m3",)), (MENDED, ())], id="the model alone, its stage by the second look"),
        pytest.param([(ALL, ("m3", "m3.encoder"))] * 3, id="again and again"),
    ],
)
async def test_what_is_loaded_anew_meanwhile_makes_no_model_unknown(looks):
    server = InferenceServer("127.0.0.1:9")
    server.client = _Client(*looks)
    assert {one.name for one in await server.pipelines({"m3": M3}, 1)} == {"m3", "other"}


async def test_a_server_that_describes_nothing_tells_no_models():
    server = InferenceServer("127.0.0.1:9")
    server.client = _Client((ALL, ("other",)), code="INTERNAL")
    with pytest.raises(InferenceServerException):
        await server.pipelines({"m3": M3}, 1)
