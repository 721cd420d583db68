"""What all stages share: the server's objects in, plain tensors through, the server's objects out.

The only importer of triton_python_backend_utils, and the only place where our errors become the server's. An
exception that leaves execute() would fail every request of the batch and send its traceback to the clients,
so each request gets its own error, and a batch that fails as a whole is run again request by request.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from backends.checkpoint import Checkpoint
from backends.contract import NOT_WELL, SHARED_MEMORY_FULL, ErrorCode, RequestParameter, StageFailure
from backends.errors import BackendError, RequestError
from backends.log_format import Formatter
from backends.options import ServingOptions
from backends.source import resolve
from backends.stages.shared_memory import is_scarce, no_room

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Output = "npt.NDArray[Any] | torch.Tensor"
CHECKPOINT = "checkpoint"
"""The entry's parameter that holds the checkpoint's reference."""
HEADS = "heads"
"""The entry's parameter that names the pipeline's heads."""


@dataclass(frozen=True)
class StageContext:
    """What the server tells a stage about its entry."""

    name: str
    checkpoint: Checkpoint
    options: ServingOptions
    parameters: Mapping[str, str]
    device: str
    """cpu, or cuda:N as the server placed this instance."""

    @property
    def heads(self) -> frozenset[str]:
        """The heads of the pipeline that the entry belongs to."""
        return frozenset(filter(None, self.parameters.get(HEADS, "").split(",")))


class StageRequest:
    """One client request inside a batch."""

    def __init__(self, request: Any) -> None:
        self._request = request

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """The request's parameters, by name."""
        parameters: dict[str, Any] = json.loads(self._request.parameters() or "{}")
        return parameters

    @cached_property
    def wanted(self) -> frozenset[str]:
        """The outputs that a later step or the client reads."""
        return frozenset(self._request.requested_output_names())

    @cached_property
    def deadline_ms(self) -> float:
        """Milliseconds since 1970, infinite without a deadline. Raises RequestError for what is no number."""
        deadline = self.parameters.get(RequestParameter.DEADLINE_MS)
        if deadline is None:
            return math.inf
        if isinstance(deadline, bool) or not isinstance(deadline, int):
            raise RequestError(
                ErrorCode.INVALID_INPUT,
                f"deadline_ms is {deadline!r}; it takes a whole number of milliseconds since 1970",
            )
        return deadline

    def check_deadline(self) -> None:
        """Raises RequestError when nobody waits for the answer any more."""
        late = time.time() * 1000 - self.deadline_ms
        if late > 0:
            raise RequestError(
                ErrorCode.DEADLINE_EXCEEDED,
                f"its deadline passed {late:.0f} ms ago, before it was computed; give it more time (the "
                "clocks of several machines must agree)",
            )

    @cached_property
    def id(self) -> str:
        """What the client calls it, as the gateway does by its x-request-id."""
        return self._request.request_id() or "without an id"

    @property
    def is_ping(self) -> bool:
        """Whether it only asks if anybody is there."""
        return bool(self.parameters.get(RequestParameter.PING))

    def array(self, name: str) -> npt.NDArray[Any]:
        """An input as numpy, with its batch dimension; STRING elements are bytes."""
        return _to_host(self._input(name))

    def optional_array(self, name: str) -> npt.NDArray[Any] | None:
        """An input that may be absent."""
        tensor = pb_utils.get_input_tensor_by_name(self._request, name)
        return None if tensor is None else _to_host(tensor)

    def tensor(self, name: str) -> torch.Tensor:
        """An input as torch, with its batch dimension: where the stage before has put it, not a copy."""
        import torch

        return torch.utils.dlpack.from_dlpack(self._input(name).to_dlpack())

    def send(self, response: Any) -> None:
        """Answers this request, before the others of its batch or after execute() has returned."""
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self._request.get_response_sender().send(response, flags=flags)

    def _input(self, name: str) -> Any:
        tensor = pb_utils.get_input_tensor_by_name(self._request, name)
        if tensor is None:
            raise RequestError(ErrorCode.INVALID_INPUT, f"the input {name} is missing")
        return tensor


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


class Stage(ABC):
    """A Python-backend model. Subclasses say what happens to a batch, in terms of plain tensors."""

    ailment: str | None = None
    """Why it will answer right no more, and must be replaced; pings are told."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Called once by the server when it loads the entry."""
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(Formatter(f"{args['model_name']}: %(levelname)s %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
        parameters = {
            name: value["string_value"]
            for name, value in json.loads(args["model_config"])["parameters"].items()
        }
        try:
            options = ServingOptions.from_parameters(parameters)
            checkpoint = Checkpoint.read(
                resolve(parameters[CHECKPOINT]), options.max_length, options.rerank_prompt
            )
            is_gpu = args["model_instance_kind"] == "GPU"
            device = f"cuda:{args['model_instance_device_id']}" if is_gpu else "cpu"
            self.setup(StageContext(args["model_name"], checkpoint, options, parameters, device))
        except BackendError as error:
            # The server prints the text of this exception as the reason why the entry is not ready.
            raise pb_utils.TritonModelException(str(error)) from error
        # What lives by now lives for ever: to look through all of torch for garbage takes 0.2 s each time, in
        # which no request is answered.
        gc.collect()
        gc.freeze()
        gc.enable()

    @abstractmethod
    def setup(self, context: StageContext) -> None:
        """Loads what the stage needs. Raises BackendError."""

    @abstractmethod
    def run(self, batch: Sequence[StageRequest]) -> Sequence[Answer | RequestError]:
        """One answer or error for each request, in order."""

    def cut(self, batch: Sequence[StageRequest]) -> Sequence[range]:
        """Neighbours in the batch that run() is given at once; all of them, unless a stage has reasons."""
        return [range(len(batch))]

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether what was raised says that the device has no room for so much at once."""
        return False

    def free_memory(self) -> None:  # noqa: B027 (most stages keep nothing)
        """Gives back what is kept for later use."""

    def check_device(self) -> None:  # noqa: B027 (a processor does not fail so)
        """Raises where the device will compute nothing more for this process."""

    def find_ailment(self) -> str | None:
        """Looked for at every ping, so it must be cheap."""
        return self.ailment

    def answer_ping(self, request: StageRequest) -> None:
        """Without outputs where all is well."""
        ailment = self.find_ailment()
        self.respond(
            request, {} if ailment is None else RequestError(ErrorCode.INTERNAL, f"{NOT_WELL}{ailment}")
        )

    def respond(self, request: StageRequest, answer: Answer | RequestError) -> None:
        """Answers a request of which execute() returns None. What cannot be sent is told in an error, and if
        that cannot be sent either, nobody can answer the request any more: its client is told when the stage
        is replaced.
        """
        try:
            request.send(_response(request, answer))
        except Exception:
            logger.exception("the answer to request %s cannot be sent", request.id)
            try:
                request.send(_response(request, failed()))
            except Exception:
                # So it is whenever the first attempt came as far as the server's own code: one response is
                # all that it allows (server 2.51).
                logger.exception("nor can it be refused")
                self.ailment = "an answer could not be sent, and whoever asked waits in vain"

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Called by the server with the requests of one batch.

        What is past its deadline is not run. Answers of all groups but the last are sent while the batch
        still runs, so that their memory is free and the next stage begins; None stands in their place
        (server 2.51).
        """
        responses: list[Any] = [None] * len(requests)
        batch: list[StageRequest] = []
        places: list[int] = []
        for place, request in enumerate(map(StageRequest, requests)):
            if request.is_ping:
                self.answer_ping(request)
            elif (refusal := _refuse_late(request)) is not None:
                responses[place] = refusal
            else:
                batch.append(request)
                places.append(place)
        groups = self.cut(batch) if batch else []
        for group in groups:
            answers = self._run_group([batch[i] for i in group])
            for i, answer in zip(group, answers, strict=True):
                if group is groups[-1]:
                    responses[places[i]] = _response(batch[i], answer)
                else:
                    self.respond(batch[i], answer)
            del answers, answer
        return responses

    def _run_group(self, batch: Sequence[StageRequest]) -> list[Answer | RequestError]:
        try:
            return list(self.run(batch))
        except Exception as error:
            lacks_memory = self.is_out_of_memory(error)
            if not lacks_memory:
                logger.exception("a batch of %d requests failed; running them one by one", len(batch))
                return [self._run_alone(request) for request in batch]
        # Out here the error, and all that its frames hold of the device, is gone.
        self.free_memory()
        middle = len(batch) // 2
        if not middle:
            return [self._run_alone(batch[0])]
        logger.warning("no memory for a batch of %d requests; running it in halves", len(batch))
        return [*self._run_group(batch[:middle]), *self._run_group(batch[middle:])]

    def _run_alone(self, request: StageRequest) -> Answer | RequestError:
        try:
            return self.run([request])[0]
        except RequestError as error:
            return error
        except Exception as error:
            logger.exception("request %s failed", request.id)
            if self.is_out_of_memory(error):
                return out_of_memory("this request")
            self.examine()
            return failed()

    def examine(self) -> None:
        """After a failure: finds out whether the device fails whatever is asked of it."""
        try:
            self.check_device()
        except Exception as error:
            logger.exception("the device fails")
            self.ailment = f"its device fails whatever it computes ({type(error).__name__})"


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


def _to_host(tensor: Any) -> npt.NDArray[Any]:
    if not tensor.is_cpu():
        # Of a client that calls the entry directly, with memory of a GPU that it shares with the server.
        import torch

        tensor = torch.utils.dlpack.from_dlpack(tensor.to_dlpack()).cpu()
        return tensor.numpy()  # type: ignore[no-any-return]
    return tensor.as_numpy()  # type: ignore[no-any-return]


def _refuse_late(request: StageRequest) -> Any:
    """The response to a request whose deadline has passed, else None."""
    try:
        request.check_deadline()
    except RequestError as error:
        return _response(request, error)
    return None


def _response(request: StageRequest, answer: Answer | RequestError) -> Any:
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
