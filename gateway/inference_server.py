"""One inference server beside its inferences: whether the process of a stage is there, how much it has
answered, and loading it anew.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc.aio as server_client
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from backends.contract import (
    FIRST_LENGTH,
    INPUT_IDS,
    KEY_LENGTH,
    LENGTH,
    NOT_WELL,
    PROMPT_LENGTH,
    ErrorCode,
    PipelineParameter,
    RequestParameter,
    StageFailure,
    multimodal_name,
)
from gateway.pipeline import Pipeline, read_pipeline

logger = logging.getLogger(__name__)

CHANNEL_OPTIONS = [
    # ColBERT answers of a full batch pass gRPC's 4 MB.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A server that is started again is found within a second; gRPC would wait up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
DEAD_STUB = re.compile(r"Stub process '(?P<instance>[^']*)' is not healthy|health mutex")
"""What a request to a process that died, or that stands still, fails with, after 1 s (server 2.51)."""
_NOT_LOADED = re.compile(r"unknown model|not at ready state|has no available versions|not ready")
# Looks at what the server has loaded, until no entry is unloaded between the list and its description.
_LOOKS = 3
# Loading reads gigabytes from a slow disk.
_LOAD_TIMEOUT_S = 1800.0
# Unloading waits for what runs; the process of a stage has 60 s for its last words.
_UNLOAD_TIMEOUT_S = 90.0
_ASK_TIMEOUT_S = 10.0
# What any server that runs answers in a millisecond, and at once while it computes or loads.
_LIVE_TIMEOUT_S = 1.0
# Inputs of an encoder, each of one number, that are one token (0 is one of every vocabulary) of one text.
_ONE_TOKEN = {INPUT_IDS: 0, LENGTH: 1, KEY_LENGTH: 1, FIRST_LENGTH: 1, PROMPT_LENGTH: 0}


def has_status(error: InferenceServerException, code: grpc.StatusCode) -> bool:
    """Whether a call ended with this status, of which tritonclient gives the name."""
    return bool(error.status() == f"StatusCode.{code.name}")


def is_not_loaded(error: InferenceServerException) -> bool:
    """Whether the server says that it has no such model, or that it has it no more."""
    return has_status(error, grpc.StatusCode.NOT_FOUND) or (
        has_status(error, grpc.StatusCode.UNAVAILABLE) and bool(_NOT_LOADED.search(error.message() or ""))
    )


class Pulse(StrEnum):
    """What a ping says of a stage."""

    ALIVE = "it answers"
    DEAD = "its process died or stands still"
    SILENT = "it does not answer"
    UNWELL = "it computes nothing any more"
    MISSING = "it is not loaded"
    UNREACHABLE = "the inference server cannot be reached"
    HALTED = "the inference server stands still"


class LoadFailed(Exception):
    """The server could not load or unload an entry; its text says why."""


class InferenceServer:
    """A client for everything but inferences of models."""

    def __init__(self, address: str) -> None:
        self.address = address
        """host:port of its gRPC interface."""
        self.client = server_client.InferenceServerClient(address, channel_args=CHANNEL_OPTIONS)
        self._inputs: dict[str, list[Any]] = {}

    async def ping(self, entry: str, timeout_s: float) -> Pulse:
        """Asks a stage's entry whether anybody is there."""
        try:
            inputs = self._inputs.get(entry) or await self._learn_inputs(entry, timeout_s)
            await self.client.infer(
                entry, inputs, parameters={RequestParameter.PING: True}, client_timeout=timeout_s
            )
        except InferenceServerException as error:
            pulse = self._read(entry, error)
            # Of a server that stands still no stage answers, and none is to blame.
            return pulse if pulse is not Pulse.SILENT or await self.is_live() else Pulse.HALTED
        return Pulse.ALIVE

    async def encode(self, entry: str, timeout_s: float) -> Pulse:
        """Asks an encoder's entry to compute one token; UNWELL where that is an internal error."""
        try:
            answer = await self.client.get_model_config(entry, client_timeout=_ASK_TIMEOUT_S)
            inputs = [_empty_input(spec, _ONE_TOKEN) for spec in answer.config.input if not spec.optional]
            await self.client.infer(entry, inputs, client_timeout=timeout_s)
        except InferenceServerException as error:
            pulse = self._read(entry, error)
            is_fault = pulse is Pulse.ALIVE and has_status(error, grpc.StatusCode.INTERNAL)
            return Pulse.UNWELL if is_fault else pulse
        return Pulse.ALIVE

    async def is_live(self) -> bool:
        """Whether it says so, at once."""
        try:
            return bool(await self.client.is_server_live(client_timeout=_LIVE_TIMEOUT_S))
        except InferenceServerException:
            return False

    def _read(self, entry: str, error: InferenceServerException) -> Pulse:
        message = error.message() or ""
        if error.status() is None:
            # The client's own.
            raise error
        if DEAD_STUB.search(message):
            return Pulse.DEAD
        failure = StageFailure.parse(message)
        if (
            failure is not None
            and failure.code is ErrorCode.INTERNAL
            and failure.message.startswith(NOT_WELL)
        ):
            return Pulse.UNWELL
        if has_status(error, grpc.StatusCode.DEADLINE_EXCEEDED):
            return Pulse.SILENT
        if is_not_loaded(error) or _NOT_LOADED.search(message):
            return Pulse.MISSING
        if has_status(error, grpc.StatusCode.UNAVAILABLE):
            return Pulse.UNREACHABLE
        # An error is an answer. Of an entry that was written anew the inputs may be others.
        self._inputs.pop(entry, None)
        logger.debug("ping of %s: %s", entry, message)
        return Pulse.ALIVE

    async def _learn_inputs(self, entry: str, timeout_s: float) -> list[Any]:
        """The smallest inputs that the server lets through: none is optional."""
        answer = await self.client.get_model_config(entry, client_timeout=timeout_s)
        inputs = [_empty_input(spec) for spec in answer.config.input if not spec.optional]
        self._inputs[entry] = inputs
        return inputs

    async def states(self, timeout_s: float = _ASK_TIMEOUT_S) -> dict[str, tuple[str, str]]:
        """State and its reason, by name, of all that the server's repository holds. Raises
        InferenceServerException.
        """
        index = await self.client.get_model_repository_index(client_timeout=timeout_s)
        return {model.name: (model.state, model.reason) for model in index.models}

    async def state(self, entry: str) -> str | None:
        """Of one entry, empty where the repository has none of that name; None where the server does not
        say.
        """
        try:
            return (await self.states()).get(entry, ("", ""))[0]
        except InferenceServerException as error:
            logger.debug("%s does not tell of %s: %s", self.address, entry, error)
            return None

    async def pipelines(self, known: Mapping[str, Pipeline], timeout_s: float) -> list[Pipeline]:
        """The models that are loaded, and of those `known` from before the ones that lack a stage at the
        moment. Raises InferenceServerException.
        """
        for _ in range(_LOOKS):
            states = {name: state for name, (state, _) in (await self.states(timeout_s)).items()}
            ready = [name for name, state in states.items() if state == "READY"]
            answers = await asyncio.gather(*(self._config(name, timeout_s) for name in ready))
            configs = {name: config for name, config in zip(ready, answers, strict=True) if config}
            if len(configs) == len(ready):
                break
            # What is loaded anew just now makes no other model unknown.
            states |= dict.fromkeys(set(ready) - configs.keys(), "UNLOADING")
        found = {
            name: read_pipeline(config, [configs[m]] if (m := multimodal_name(name)) in configs else ())
            for name, config in configs.items()
            # Only ensembles describe a model.
            if PipelineParameter.TASKS in config.parameters
        }
        for name, pipeline in known.items():
            stages = [states.get(step, "") for step in pipeline.steps]
            # Of one whose ensemble for images is not there only that for texts was found.
            of_texts = pipeline.ensembles[name] if pipeline.image_steps else ()
            is_whole = name in found and found[name].steps != of_texts
            if not is_whole and _is_being_mended(states.get(name, ""), stages):
                found[name] = pipeline
        return list(found.values())

    async def _config(self, name: str, timeout_s: float) -> Any:
        """None of one that is not loaded any more."""
        try:
            return (await self.client.get_model_config(name, client_timeout=timeout_s)).config
        except InferenceServerException as error:
            if is_not_loaded(error):
                return None
            raise

    async def answer_count(self, entry: str) -> int | None:
        """Requests that an entry has answered since it was loaded; None where the server does not say."""
        try:
            answer = await self.client.get_inference_statistics(entry, client_timeout=_ASK_TIMEOUT_S)
        except InferenceServerException:
            return None
        counts = (s.inference_stats for s in answer.model_stats)
        return sum(int(stats.success.count + stats.fail.count) for stats in counts)

    async def success_count(self, entries: Iterable[str]) -> int | None:
        """Requests that they have answered without an error since they were loaded; None where the server
        does not say.
        """
        try:
            answers = await asyncio.gather(
                *(self.client.get_inference_statistics(e, client_timeout=_ASK_TIMEOUT_S) for e in entries)
            )
        except InferenceServerException:
            return None
        return sum(int(s.inference_stats.success.count) for answer in answers for s in answer.model_stats)

    async def is_loaded(self, entry: str) -> bool:
        """Whether the server would take requests for an entry."""
        try:
            return bool(await self.client.is_model_ready(entry, client_timeout=_ASK_TIMEOUT_S))
        except InferenceServerException:
            return False

    async def unload(self, entry: str) -> None:
        """Raises LoadFailed."""
        try:
            await self.client.unload_model(entry, client_timeout=_UNLOAD_TIMEOUT_S)
        except InferenceServerException as error:
            if has_status(error, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise LoadFailed(
                    f"the server {self.address} did not unload it within {_UNLOAD_TIMEOUT_S:g} s, as it does "
                    "not where a process stands still that cannot be ended from here; restart that server"
                ) from error
            raise LoadFailed(error.message() or str(error)) from error

    async def load(self, entry: str) -> None:
        """Returns when the entry, and every ensemble over it, is ready. Raises LoadFailed."""
        self._inputs.pop(entry, None)
        try:
            await self.client.load_model(entry, client_timeout=_LOAD_TIMEOUT_S)
        except InferenceServerException as error:
            raise LoadFailed(error.message() or str(error)) from error

    async def close(self) -> None:
        """Gives the connection back."""
        await self.client.close()


def _is_being_mended(ensemble: str, stages: Sequence[str]) -> bool:
    """Of a model that is not ready, by the states of its entries: whether it lacks a stage for a while. Of
    one that was taken away all stages are gone at once, or none is.
    """
    is_alive = any(state in ("READY", "LOADING", "UNLOADING") for state in stages)
    return is_alive and (ensemble == "LOADING" or any(state != "READY" for state in stages))


def _empty_input(spec: Any, numbers: Mapping[str, int] = MappingProxyType({})) -> Any:
    """A batch of one with nothing along the dimensions that vary; of texts, one that is empty, and of the
    inputs that have a number, that one.
    """
    dtype = model_config_pb2.DataType.Name(spec.data_type).removeprefix("TYPE_")
    is_text = dtype == "STRING"
    varying = int(is_text or spec.name in numbers)
    shape = [1, *(varying if size < 0 else size for size in spec.dims)]
    tensor = server_client.InferInput(spec.name, shape, "BYTES" if is_text else dtype)
    if is_text:
        tensor.set_data_from_numpy(np.full(shape, b"", object))
    elif dtype == "BF16":
        # tritonclient wants an array of another package's type, to write nothing.
        tensor._raw_content = b""
    else:
        tensor.set_data_from_numpy(np.full(shape, numbers.get(spec.name, 0), _NUMPY[dtype]))
    return tensor


_NUMPY = {"INT32": np.int32, "UINT8": np.uint8, "BOOL": np.bool_, "FP16": np.float16, "FP32": np.float32}
