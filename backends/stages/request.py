"""One client request as a stage reads it: plain values and tensors of what the server hands over."""

from __future__ import annotations

import json
import math
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from backends.contract import ErrorCode, RequestParameter
from backends.errors import RequestError

if TYPE_CHECKING:
    import torch


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


def _to_host(tensor: Any) -> npt.NDArray[Any]:
    if not tensor.is_cpu():
        # Of a client that calls the entry directly, with memory of a GPU that it shares with the server.
        import torch

        tensor = torch.utils.dlpack.from_dlpack(tensor.to_dlpack()).cpu()
        return tensor.numpy()  # type: ignore[no-any-return]
    return tensor.as_numpy()  # type: ignore[no-any-return]
