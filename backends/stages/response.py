"""What a stage answers, as the server takes it: the only place where our errors become the server's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from backends.contract import SHARED_MEMORY_FULL, ErrorCode, StageFailure
from backends.errors import RequestError
from backends.stages.request import StageRequest
from backends.stages.shared_memory import is_scarce, no_room

logger = logging.getLogger(__name__)

# The server has no status of its own for a deadline.
_STATUSES = {
    ErrorCode.INTERNAL: "INTERNAL",
    ErrorCode.DEADLINE_EXCEEDED: "CANCELLED",
    ErrorCode.OUT_OF_MEMORY: "UNAVAILABLE",
}

# No entry has a blank in its name.
_NOBODY = "no model"

Answer = dict[str, Any]
"""Outputs of one request by name: numpy arrays or torch tensors, with their batch dimension."""


def failed() -> RequestError:
    """What is answered to a request on which the code failed; why is in the log alone."""
    return RequestError(ErrorCode.INTERNAL, "the model failed on this request; the server's log tells why")


def out_of_memory(what: str) -> RequestError:
    """What is answered where the device has no room for `what`."""
    return RequestError(
        ErrorCode.OUT_OF_MEMORY,
        f"the device has no memory for {what} at the moment; try again in a while, or send shorter inputs "
        "(the operator can lower --max-batch-tokens, or load fewer models on it)",
    )


def to_response(request: StageRequest, answer: Answer | RequestError) -> Any:
    """An answer as the server takes it, of the outputs that are read; an error where it is one, or where
    shared memory has no room for it.
    """
    if isinstance(answer, RequestError):
        return pb_utils.InferenceResponse(error=_error(answer.failure))
    tensors = {name: _output(name, value) for name, value in answer.items() if name in request.wanted}
    sizes = {name: size for name in tensors if (size := _host_bytes(answer[name]))}
    needed = sum(sizes.values())
    if needed and is_scarce(needed) and not _hold([tensors[name] for name in sizes]):
        logger.warning("no room in shared memory for %d bytes of request %s", needed, request.id)
        return pb_utils.InferenceResponse(error=_error(no_room(needed).failure))
    return pb_utils.InferenceResponse(list(tensors.values()))


def _hold(tensors: Sequence[Any]) -> bool:
    """Puts tensors into shared memory before they are sent, from where sending takes them; False where it has
    no room for them.

    A response that does not fit fails when it is sent, and then no other can be sent (server 2.51). An
    inference that is asked from here fails without harm, so one is asked of a model that is not there: 0.3 ms
    beside the copy, which is made once.
    """
    request = pb_utils.InferenceRequest(
        model_name=_NOBODY, requested_output_names=["nothing"], inputs=list(tensors)
    )
    return SHARED_MEMORY_FULL not in request.exec().error().message()


def _host_bytes(value: Any) -> int:
    is_on_host = isinstance(value, np.ndarray) or value.device.type == "cpu"
    return int(value.nbytes) if is_on_host else 0


def _error(failure: StageFailure) -> Any:
    name = _STATUSES.get(failure.code, "INVALID_ARG")
    return pb_utils.TritonError(str(failure), getattr(pb_utils.TritonError, name))


def _output(name: str, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return pb_utils.Tensor(name, value)
    # Server 2.51: from_dlpack copies a float32 tensor of the CPU once more, numpy has no bfloat16.
    if value.device.type == "cpu" and value.dtype.is_floating_point and value.dtype.itemsize == 4:
        return pb_utils.Tensor(name, value.numpy())
    return pb_utils.Tensor.from_dlpack(name, value.contiguous())
