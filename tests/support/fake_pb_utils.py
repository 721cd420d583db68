"""Stands in for the module that exists only inside the server's Python backend.

The real one runs in tests/server.
"""

import json
import threading
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class TritonModelException(Exception):
    pass


class TritonError:
    INTERNAL = "INTERNAL"
    INVALID_ARG = "INVALID_ARG"
    CANCELLED = "CANCELLED"
    UNAVAILABLE = "UNAVAILABLE"

    def __init__(self, message: str, code: str) -> None:
        self.message = message
        self.code = code


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name = name
        self.value: Any = array

    @classmethod
    def from_dlpack(cls, name: str, tensor: torch.Tensor) -> "Tensor":
        made = cls(name, np.empty(0))
        made.value = tensor
        return made

    def is_cpu(self) -> bool:
        return isinstance(self.value, np.ndarray)

    def as_numpy(self) -> np.ndarray:
        assert self.is_cpu(), "as the real one, which has no numpy for memory of a GPU"
        return self.value

    def to_dlpack(self) -> Any:
        return torch.utils.dlpack.to_dlpack(torch.as_tensor(self.value))


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None

    def value(self, name: str) -> Any:
        return next(tensor.value for tensor in self.output_tensors if tensor.name == name)


@dataclass
class Request:
    """One request, as a stage's execute() receives it."""

    inputs: dict[str, np.ndarray]
    given: dict[str, Any] = field(default_factory=dict)
    wanted: tuple[str, ...] = (
        "input_ids",
        "length",
        "n_tokens",
        "truncated",
        "hidden",
        "last_hidden",
        "dense",
    )

    sent: list["InferenceResponse"] = field(default_factory=list)
    is_sent: threading.Event = field(default_factory=threading.Event)

    def get_response_sender(self) -> "Request":
        return self

    fails_to_send: bool = False
    is_spent: bool = False

    def send(self, response: InferenceResponse, flags: int) -> None:
        assert flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL
        if self.is_spent:
            raise TritonModelException("Non-decoupled model cannot send more than one response.")
        self.is_spent = self.fails_to_send
        if self.fails_to_send:
            raise TritonModelException("Failed to increase the shared memory pool size for key 'k'")
        self.sent.append(response)
        self.is_sent.set()

    id: str = ""

    def request_id(self) -> str:
        return self.id

    def parameters(self) -> str:
        return json.dumps(self.given)

    def requested_output_names(self) -> list[str]:
        return list(self.wanted)


class InferenceRequest:
    """Of a model that is not there: tensors go into shared memory, and the answer is an error."""

    room: ClassVar[int | None] = None
    """Bytes that one may take."""

    def __init__(self, model_name: str, requested_output_names: list[str], inputs: list[Tensor]) -> None:
        assert requested_output_names
        assert inputs, "as the real one, which takes no request without inputs"
        self.bytes = sum(tensor.value.nbytes for tensor in inputs)

    def exec(self) -> "InferenceRequest":
        return self

    def error(self) -> "InferenceRequest":
        return self

    def message(self) -> str:
        is_full = self.room is not None and self.bytes > self.room
        return "Failed to increase the shared memory pool size" if is_full else "Model is not ready"


class Metric:
    def __init__(self, labels: dict[str, str]) -> None:
        self.labels = labels
        self.value = 0.0

    def increment(self, amount: float) -> None:
        assert amount >= 0, "as the real one, of a counter"
        self.value += amount

    def set(self, value: float) -> None:
        self.value = value


class MetricFamily:
    COUNTER = "counter"
    GAUGE = "gauge"
    made: ClassVar[dict[str, "MetricFamily"]] = {}

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name, self.kind = name, kind
        self.metrics: list[Metric] = []
        self.made[name] = self

    def Metric(self, labels: dict[str, str]) -> Metric:
        self.metrics.append(Metric(labels))
        return self.metrics[-1]


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return Tensor(name, request.inputs[name]) if name in request.inputs else None


def answers(stage: Any, requests: list[Request]) -> list["InferenceResponse"]:
    """What a stage answers to a batch of requests, at once or later."""
    found = []
    for request in requests:
        request.sent.clear()
        request.is_sent.clear()
    for request, returned in zip(requests, stage.execute(requests), strict=True):
        if returned is None:
            assert request.is_sent.wait(60), "a request was not answered"
            (returned,) = request.sent
        else:
            assert not request.sent, "a request was answered twice"
        found.append(returned)
    return found
