"""The way to the inference server: the only importer of tritonclient, and the only mapper of its statuses.

A request's items are sorted by size, cut into server requests of at most the model's batch size, sent at once
over one long-lived gRPC channel, and put back in order.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import numpy as np
import numpy.typing as npt
import tritonclient.grpc.aio as server_client
from tritonclient.utils import InferenceServerException

from backends.contract import (
    COUNT_OF,
    SPARSE_INDICES,
    SPARSE_WEIGHTS,
    TEXT,
    TOKEN_EMBEDDINGS,
    TOKEN_VECTORS,
    ErrorCode,
    PipelineParameter,
    StageFailure,
    Task,
    entry_name,
)
from gateway.errors import AnswerTooLarge, GatewayError, RefusedItem, ServerFault, TimedOut, Unavailable

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Parameters = Mapping[str, str | int | bool]

_CHANNEL_OPTIONS = [
    # ColBERT answers of a full batch pass gRPC's 4 MB.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A server that is started again is found within a second; gRPC would wait up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_LARGE = frozenset({TOKEN_VECTORS, TOKEN_EMBEDDINGS})
_LARGE_PARTS = 4
# Of a long query that goes with each of thousands of documents only so much is in flight at once.
_LARGE_REQUEST_BYTES = 32 * 2**20
# A sparse weight becomes an object of 40 characters, four times what it takes of a dense vector.
_JSON_WEIGHT = {SPARSE_INDICES: 4, SPARSE_WEIGHTS: 4}
# A stub that died is noticed by nobody but the request that meets it; the model cannot answer until it is
# loaded anew.
_DEAD_STUB = re.compile(r"Stub process .* is not healthy")


@dataclass(frozen=True)
class Pipeline:
    """A model as the server describes it."""

    name: str
    """The ensemble's name."""
    served_model_name: str
    """The name that clients use."""
    tasks: frozenset[Task]
    family: str
    dimensions: int | None
    """Components of a dense embedding; None where there is none, or where only the model knows."""
    max_length: int
    """Tokens of one text."""
    max_batch_size: int
    """Texts of one server request."""
    max_batch_tokens: int
    """Tokens of one forward pass of the encoder."""
    has_roles: bool = False
    """Whether queries and documents are encoded differently."""
    checkpoint: str = ""
    """Where it comes from."""
    pooling: str = ""
    """How a dense embedding is made of its tokens."""
    dtype: str = "auto"
    truncation: str = "error"
    """What happens to a text over the limit when the request does not say."""
    takes_instructions: bool = False
    """Whether it was made for instructions."""
    has_role_prompts: bool = False
    """Whether the checkpoint has prompts of its own for queries or documents."""
    matryoshka_dimensions: tuple[int, ...] = ()
    """The sizes that an embedding may be cut to, where the checkpoint lists them."""
    labels: tuple[str, ...] = ()
    """Of a reranker or classifier."""
    score_activation: str = "identity"
    score_is_probability: bool = False
    """Whether the model's makers give a probability, not a logit."""
    label_activation: str = "identity"


Item = bytes | tuple[bytes, bytes]
"""A text, or a pair of texts."""
Answer = Array | list[Array]
"""One row for each item, or for outputs of different length an array for each item."""


class Inference(Protocol):
    """What the gateway needs of an inference server; tests put a fake in its place."""

    async def pipelines(self) -> list[Pipeline]:
        """The models that are loaded. Raises GatewayError."""

    async def infer(
        self,
        pipeline: Pipeline,
        items: Sequence[Item],
        outputs: Sequence[str],
        parameters: Parameters,
        stage: str | None = None,
    ) -> dict[str, Answer]:
        """The outputs of every item, in the order of the items; of the whole pipeline, or of one stage alone.

        Raises GatewayError.
        """

    def last_success(self, pipeline: Pipeline) -> float | None:
        """time.monotonic() of the last answer of a model."""

    async def close(self) -> None:
        """Gives the connection back."""


class GrpcInference:
    """Inference over the server's gRPC interface."""

    def __init__(self, server: str, timeout_s: float, max_answer_bytes: int) -> None:
        self._client = server_client.InferenceServerClient(server, channel_args=_CHANNEL_OPTIONS)
        self._server = server
        self._timeout_s = timeout_s
        self._max_answer_bytes = max_answer_bytes
        self._last_success: dict[str, float] = {}

    async def pipelines(self) -> list[Pipeline]:
        try:
            index = await self._client.get_model_repository_index(client_timeout=self._timeout_s)
            # Entries of stages have a dot and the stage's name behind the pipeline's; only ensembles describe
            # a model.
            ready = [model.name for model in index.models if model.state == "READY"]
            configs = await asyncio.gather(
                *(self._client.get_model_config(name, client_timeout=self._timeout_s) for name in ready)
            )
        except InferenceServerException as error:
            raise self._explain(error, self._server) from error
        return sorted(
            (
                _pipeline(answer.config)
                for answer in configs
                if PipelineParameter.TASKS in answer.config.parameters
            ),
            key=lambda pipeline: pipeline.name,
        )

    async def infer(
        self,
        pipeline: Pipeline,
        items: Sequence[Item],
        outputs: Sequence[str],
        parameters: Parameters,
        stage: str | None = None,
    ) -> dict[str, Answer]:
        parts = _cut(items, pipeline)
        asked = list(dict.fromkeys([*outputs, *(COUNT_OF[name] for name in outputs if name in COUNT_OF)]))
        model = pipeline.name if stage is None else entry_name(pipeline.name, stage)
        # Answers with a vector for each token are a thousand times larger than their texts: a few at a time.
        is_large = bool(_LARGE & set(outputs)) or sum(map(_size, items)) > _LARGE_REQUEST_BYTES
        gate = asyncio.Semaphore(_LARGE_PARTS if is_large else len(parts))
        size = 0

        async def infer_part(part: Sequence[int]) -> dict[str, Array]:
            nonlocal size
            async with gate:
                if size > self._max_answer_bytes:
                    raise _too_large(self._max_answer_bytes)
                own = [items[i] for i in part]
                answer = await self._infer_part(pipeline, model, own, asked, parameters)
                size += sum(array.nbytes * _JSON_WEIGHT.get(name, 1) for name, array in answer.items())
                if size > self._max_answer_bytes:
                    raise _too_large(self._max_answer_bytes)
                return answer

        answers = await asyncio.gather(*map(infer_part, parts), return_exceptions=True)
        failures = [
            _place(a, part) for a, part in zip(answers, parts, strict=True) if isinstance(a, BaseException)
        ]
        if failures:
            # Of several refused items the client is told the first, whichever server request came back first.
            raise min(failures, key=_first_item)
        good = [answer for answer in answers if not isinstance(answer, BaseException)]
        return {name: _merge(name, good, parts, len(items)) for name in outputs}

    async def _infer_part(
        self,
        pipeline: Pipeline,
        model: str,
        items: Sequence[Item],
        outputs: Sequence[str],
        parameters: Parameters,
    ) -> dict[str, Array]:
        rows = [item if isinstance(item, tuple) else (item,) for item in items]
        elements = np.array(rows, dtype=np.object_)
        text = server_client.InferInput(TEXT, list(elements.shape), "BYTES")
        text.set_data_from_numpy(elements)
        try:
            result = await self._client.infer(
                model,
                [text],
                outputs=[server_client.InferRequestedOutput(name) for name in outputs],
                parameters=dict(parameters) or None,
                client_timeout=self._timeout_s,
            )
        except InferenceServerException as error:
            raise self._explain(error, pipeline.served_model_name) from error
        if model == pipeline.name:
            self._last_success[model] = time.monotonic()
        return {name: result.as_numpy(name) for name in outputs}

    def last_success(self, pipeline: Pipeline) -> float | None:
        return self._last_success.get(pipeline.name)

    async def close(self) -> None:
        await self._client.close()

    def _explain(self, error: InferenceServerException, subject: str) -> GatewayError:
        """A status of the server -> the error that the client sees."""
        status = error.status() or ""
        message = error.message() or ""
        failure = StageFailure.parse(message)
        if failure is not None and failure.code is not ErrorCode.INTERNAL:
            return RefusedItem(failure.message, item=failure.item, reason=failure.code)
        if failure is None and _DEAD_STUB.search(message):
            logger.debug("%s: %s", subject, message)
            return Unavailable(f"the model {subject} does not answer at the moment; try again in a while")
        if status == _status(grpc.StatusCode.DEADLINE_EXCEEDED):
            return TimedOut(
                f"{subject} did not answer within {self._timeout_s:g} s; send fewer or shorter inputs"
            )
        if status == _status(grpc.StatusCode.UNAVAILABLE):
            logger.debug("%s: %s", subject, message)
            return Unavailable("the inference server cannot be reached at the moment; try again in a while")
        if status == _status(grpc.StatusCode.NOT_FOUND):
            return Unavailable(f"the model {subject} is not loaded at the moment; try again in a while")
        logger.error("%s: %s %s", subject, status, message)
        return ServerFault("the model failed on this request; the server's log tells why")


def _pipeline(config: Any) -> Pipeline:
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    dimensions = parameters.get(PipelineParameter.DIMENSIONS)
    return Pipeline(
        name=config.name,
        served_model_name=parameters.get(PipelineParameter.SERVED_MODEL_NAME, config.name),
        tasks=frozenset(Task(task) for task in parameters[PipelineParameter.TASKS].split(",")),
        family=parameters.get(PipelineParameter.FAMILY, ""),
        dimensions=None if dimensions is None else int(dimensions),
        max_length=int(parameters[PipelineParameter.MAX_LENGTH]),
        max_batch_size=config.max_batch_size,
        max_batch_tokens=int(parameters[PipelineParameter.MAX_BATCH_TOKENS]),
        has_roles=parameters.get(PipelineParameter.ROLES) == "true",
        checkpoint=parameters.get(PipelineParameter.CHECKPOINT, ""),
        pooling=parameters.get(PipelineParameter.POOLING, ""),
        dtype=parameters.get(PipelineParameter.DTYPE, "auto"),
        truncation=parameters.get(PipelineParameter.TRUNCATION, "error"),
        takes_instructions=parameters.get(PipelineParameter.INSTRUCTIONS) == "true",
        has_role_prompts=parameters.get(PipelineParameter.ROLE_PROMPTS) == "true",
        matryoshka_dimensions=tuple(
            map(int, filter(None, parameters.get(PipelineParameter.MATRYOSHKA_DIMENSIONS, "").split(",")))
        ),
        labels=tuple(json.loads(parameters.get(PipelineParameter.LABELS, "[]"))),
        score_is_probability=parameters.get(PipelineParameter.SCORE_IS_PROBABILITY) == "true",
        score_activation=parameters.get(PipelineParameter.SCORE_ACTIVATION, "identity"),
        label_activation=parameters.get(PipelineParameter.LABEL_ACTIVATION, "identity"),
    )


def _merge(
    name: str, answers: Sequence[Mapping[str, Array]], parts: Sequence[Sequence[int]], count: int
) -> Answer:
    """One output of several server requests, in the order of the client's items."""
    if name in COUNT_OF:
        pieces: list[Array] = [np.empty(0)] * count
        for answer, part in zip(answers, parts, strict=True):
            ends = np.cumsum(answer[COUNT_OF[name]][:, 0])
            for i, piece in zip(part, np.split(answer[name][0], ends[:-1]), strict=True):
                pieces[i] = piece
        return pieces
    rows = [answer[name] for answer in answers]
    if len(rows) == 1:
        return rows[0]
    merged = np.empty((count, *rows[0].shape[1:]), rows[0].dtype)
    for part, row in zip(parts, rows, strict=True):
        merged[part] = row
    return merged


def _too_large(max_bytes: int) -> AnswerTooLarge:
    return AnswerTooLarge(
        f"the answer would hold more than {max_bytes} bytes of numbers; send fewer or shorter inputs at a "
        "time (the operator can raise the limit with GATEWAY_MAX_ANSWER_BYTES)"
    )


def _status(code: grpc.StatusCode) -> str:
    return f"StatusCode.{code.name}"


def _size(item: Item) -> int:
    """Bytes of a text or pair."""
    return len(item) if isinstance(item, bytes) else len(item[0]) + len(item[1])


def _cut(items: Sequence[Item], pipeline: Pipeline) -> list[list[int]]:
    """Indices of the items of each server request: of about one size, so that none waits for a much longer
    one.

    Within the model's batch size, and within its token budget as far as bytes tell: a token of natural text
    has two bytes and more.
    """
    lengths = list(map(_size, items))
    sizes = [min(length // 2 + 2, pipeline.max_length) for length in lengths]
    if len(items) <= pipeline.max_batch_size and sum(sizes) <= pipeline.max_batch_tokens:
        return [list(range(len(items)))]
    parts: list[list[int]] = []
    total = 0
    for i in sorted(range(len(items)), key=lambda i: lengths[i]):
        total += sizes[i]
        if not parts or len(parts[-1]) == pipeline.max_batch_size or total > pipeline.max_batch_tokens:
            parts.append([])
            total = sizes[i]
        parts[-1].append(i)
    return parts


def _place(error: BaseException, part: Sequence[int]) -> BaseException:
    """A refused item's place in a server request -> its place in the client's list."""
    if isinstance(error, RefusedItem) and error.item is not None:
        return RefusedItem(error.message, item=part[error.item], reason=error.reason)
    return error


def _first_item(error: BaseException) -> tuple[bool, int]:
    """Sorts faults of this side before refused items, and those by their place."""
    is_refusal = isinstance(error, RefusedItem)
    return is_refusal, error.item or 0 if isinstance(error, RefusedItem) else 0
