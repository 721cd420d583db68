"""The way to the inference server, and the only mapper of its statuses.

The server requests of one client request are sent at once over one long-lived gRPC channel. One that met a
process that died is sent once more, to another server or when the model is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import grpc
import tritonclient.grpc.aio as server_client
from tritonclient.utils import InferenceServerException

from backends.contract import (
    COUNT_OF,
    ENCODER_TIMES,
    IMAGE_TIMES,
    SHARED_MEMORY_FULL,
    SPARSE_INDICES,
    SPARSE_WEIGHTS,
    TOKEN_EMBEDDINGS,
    TOKEN_VECTORS,
    TOKENIZER_TIMES,
    ErrorCode,
    RequestParameter,
    StageFailure,
    multimodal_name,
    stage_of,
)
from gateway import phases
from gateway.admission import Admission, AdmissionLimits
from gateway.availability import Availability
from gateway.batches import Answer, Array, Item, Part, cut, merge, size, tensors
from gateway.charge import charged, check
from gateway.context import current
from gateway.errors import (
    AnswerTooLarge,
    GatewayError,
    ModelLost,
    RefusedItem,
    ServerFault,
    TimedOut,
    Unavailable,
)
from gateway.inference_server import DEAD_STUB, NOT_LOADED, InferenceServer
from gateway.lane import FreePass, Price, Ticket
from gateway.pipeline import Pipeline
from gateway.urgency import time_limit

logger = logging.getLogger(__name__)

Parameters = Mapping[str, str | int | bool]
Result = TypeVar("Result")

_LARGE = frozenset({TOKEN_VECTORS, TOKEN_EMBEDDINGS})
_LARGE_PARTS = 4
# Enough to keep the image stage and the encoder busy.
_IMAGE_PARTS = 8
# Of a long query that goes with each of thousands of documents only so much is in flight at once.
_LARGE_REQUEST_BYTES = 32 * 2**20
# A sparse weight becomes an object of 40 characters, four times what it takes of a dense vector.
_JSON_WEIGHT = {SPARSE_INDICES: 4, SPARSE_WEIGHTS: 4}
_PYTHON_FAULT = re.compile(r"(?s)(?<=message: )\w*(?:Error|Exception)\b.*")
# A list takes milliseconds, also of a server that computes or loads, but seconds where it gets no processor.
# One that stands still holds up what another has answered for the first time only.
_OTHERS_LIST_TIMEOUT_S = 2.0
_LIST_TIMEOUT_S = 10.0
# Of a request that met a dead process it is tried once more.
_ATTEMPTS = 2
_NEVER = float("-inf")


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
        """The outputs of every item, in the order of the items; of the whole pipeline, or of one stage alone:
        tokenizer, which takes texts, or image, which takes items with images.

        Raises GatewayError.
        """

    def last_success(self, pipeline: Pipeline) -> float | None:
        """time.monotonic() of the last answer of a model; of one that takes images, of its last answer to a
        text or of its image stage's, whichever is older.
        """

    async def close(self) -> None:
        """Gives the connection back."""


class GrpcInference:
    """Inference over the gRPC interface of one server, or of several that serve the same."""

    def __init__(
        self,
        addresses: Sequence[str],
        timeout_s: float,
        max_answer_bytes: int,
        *,
        limits: AdmissionLimits | None = None,
        repair_wait_s: float = 0.0,
    ) -> None:
        """`addresses`: host:port of each server. Requests wait for a model that was lost until
        `repair_wait_s` after its loss.
        """
        self.admission = Admission(limits or AdmissionLimits())
        self.servers = [InferenceServer(address) for address in addresses]
        self.availability = Availability(repair_wait_s, [self._tell])
        self._timeout_s = timeout_s
        self._max_answer_bytes = max_answer_bytes
        self._last_success: dict[str, float] = {}
        self._image_turns: dict[str, asyncio.Semaphore] = {}
        self._known: dict[str, Pipeline] = {}
        # Calls to the servers, by server and ensemble; a cancelled one met a process that died.
        self._calls: dict[tuple[str, str], set[asyncio.Task[Any]]] = {}
        # Server requests with their turns; some are there when their clients have gone.
        self._stays: set[asyncio.Task[Any]] = set()

    def _turn(
        self, pipeline: Pipeline, stage: str | None, part: Part
    ) -> contextlib.AbstractAsyncContextManager[None]:
        """Of items with images few server requests are under way for all clients together: the encoder takes
        all that wait at once, and a text among them waits for all.
        """
        if stage is not None or not part.has_images:
            return contextlib.nullcontext()
        return self._image_turns.setdefault(pipeline.name, asyncio.Semaphore(_IMAGE_PARTS))

    async def pipelines(self) -> list[Pipeline]:
        answers = await _answers_in_time(
            [server.pipelines(self._known, _LIST_TIMEOUT_S) for server in self.servers]
        )
        lists = [answer for answer in answers if isinstance(answer, list)]
        if not lists:
            error = next(answer for answer in answers if isinstance(answer, BaseException))
            if not isinstance(error, InferenceServerException):
                raise error
            if error.status() == _status(grpc.StatusCode.DEADLINE_EXCEEDED):
                raise Unavailable(
                    f"the inference server did not list its models within {_LIST_TIMEOUT_S:g} s; try again "
                    "in a while"
                ) from error
            raise self._explain(error, self.servers[0].address) from error
        # Where two servers do not agree, as while one of them is being given new weights, the first counts.
        found = {pipeline.name: pipeline for pipelines in reversed(lists) for pipeline in pipelines}
        self._known = found
        return sorted(found.values(), key=lambda pipeline: pipeline.name)

    async def infer(
        self,
        pipeline: Pipeline,
        items: Sequence[Item],
        outputs: Sequence[str],
        parameters: Parameters,
        stage: str | None = None,
    ) -> dict[str, Answer]:
        parts = cut(items, pipeline)
        asked = list(dict.fromkeys([*outputs, *(COUNT_OF[name] for name in outputs if name in COUNT_OF)]))
        # Answers with a vector for each token are a thousand times larger than their texts: a few at a time.
        is_large = bool(_LARGE & set(outputs)) or sum(map(size, items)) > _LARGE_REQUEST_BYTES
        # The patches of an image take megabytes, however few bytes its file has.
        is_large = is_large or any(part.has_images for part in parts)
        gate = asyncio.Semaphore(_LARGE_PARTS if is_large else len(parts))
        answered = 0
        began = time.monotonic()

        async def stay(part: Part) -> tuple[float, dict[str, Array]]:
            own = [items[i] for i in part.places]
            model = _entry(pipeline, stage, has_images=part.has_images)
            told = _times(pipeline, stage, has_images=part.has_images)
            async with ticket.turn(part.tokens, part.size), self._turn(pipeline, stage, part):
                sent = time.monotonic()
                given = tensors(own, stage)
                return sent, await self._ask(pipeline, model, given, [*asked, *told], parameters)

        async def infer_part(part: Part) -> dict[str, Array]:
            nonlocal answered
            async with gate:
                if answered > self._max_answer_bytes:
                    raise _too_large(self._max_answer_bytes)
                sent, answer = await self._outlive(stay(part))
                _record(began, sent, answer, stage)
                answered += sum(array.nbytes * _JSON_WEIGHT.get(name, 1) for name, array in answer.items())
                if answered > self._max_answer_bytes:
                    raise _too_large(self._max_answer_bytes)
                return answer

        limit = time_limit(self._timeout_s)
        if limit is not None:
            parameters = {**parameters, RequestParameter.DEADLINE_MS: limit.deadline_ms}
        with self._enter(pipeline, items, parts, asked, stage) as ticket:
            try:
                async with limit.watch(pipeline.served_model_name) if limit else contextlib.nullcontext():
                    answers = await _all_or_fault(infer_part, parts)
            except TimedOut:
                ticket.expire()
                raise
            failures = [
                _place(a, part) for a, part in zip(answers, parts, strict=True) if isinstance(a, RefusedItem)
            ]
            if failures:
                # Of several refused items the client is told the first, whichever server request came back
                # first.
                raise min(failures, key=lambda error: error.item or 0)
        good = [answer for answer in answers if not isinstance(answer, RefusedItem)]
        return {name: merge(name, good, parts, len(items)) for name in outputs}

    @contextlib.contextmanager
    def _enter(
        self,
        pipeline: Pipeline,
        items: Sequence[Item],
        parts: Sequence[Part],
        outputs: Sequence[str],
        stage: str | None,
    ) -> Iterator[Ticket | FreePass]:
        """A client request's leave to send what it has. Raises TooManyRequests.

        A canary must tell of the server, not of the queue. What one stage alone answers takes nothing of the
        encoder, whose tokens are counted, and is limited by its bytes.
        """
        context = current()
        if context is None or stage is not None:
            yield FreePass()
            return
        queue = self.admission.queue(pipeline.name, pipeline.served_model_name, pipeline.max_batch_tokens)
        price = Price(sum(part.tokens for part in parts), sum(part.size for part in parts))
        check(context)
        with (
            queue.enter(price, context.lane, lambda: hash((tuple(items), tuple(outputs)))) as ticket,
            charged(context, price.tokens, lambda: ticket.sent),
        ):
            yield ticket

    async def _outlive(self, stay: Coroutine[Any, Any, Result]) -> Result:
        """Its result. Where nobody waits for that any more, what has not been sent ends, and what has been
        keeps its turn until the server is done with it.
        """
        task = asyncio.create_task(stay)
        self._stays.add(task)
        task.add_done_callback(self._stays.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            raise

    async def _ask(
        self,
        pipeline: Pipeline,
        model: str,
        given: Mapping[str, Array],
        outputs: Sequence[str],
        parameters: Parameters,
    ) -> dict[str, Array]:
        """One server request to an entry of the pipeline; another where the first met a dead process."""
        for attempt in range(1, _ATTEMPTS + 1):
            ensemble = pipeline.ensemble_of(model)
            server = await self._choose(pipeline, ensemble)
            try:
                return await self._send(server, pipeline, model, given, outputs, parameters)
            except ModelLost as error:
                newest = await self._newest(pipeline) if error.is_unloaded else pipeline
                if newest.steps == pipeline.steps:
                    self.availability.lose(server.address, ensemble, error.message)
                else:
                    # It was replaced while it served, and the entries that this one knew are gone for good.
                    model = newest.entry(stage_of(pipeline.name, model)) if model in pipeline.steps else model
                    pipeline = newest
                if attempt == _ATTEMPTS:
                    raise
        raise AssertionError("not reached")

    async def _newest(self, pipeline: Pipeline) -> Pipeline:
        """The model as the server describes it now."""
        with contextlib.suppress(GatewayError):
            await self.pipelines()
        return self._known.get(pipeline.name, pipeline)

    async def _choose(self, pipeline: Pipeline, ensemble: str) -> InferenceServer:
        """Of the servers where the ensemble answers the one with the fewest requests under way. Waits for one
        that has lost it a moment ago.
        """
        context = current()
        deadline = None if context is None else context.deadline
        addresses = [server.address for server in self.servers]
        usable = await self.availability.usable(ensemble, addresses, deadline)
        if not usable:
            raise _not_answering(pipeline.served_model_name)
        able = (server for server in self.servers if server.address in usable)
        return min(able, key=lambda server: len(self._calls.get((server.address, ensemble), ())))

    async def _send(
        self,
        server: InferenceServer,
        pipeline: Pipeline,
        model: str,
        given: Mapping[str, Array],
        outputs: Sequence[str],
        parameters: Parameters,
    ) -> dict[str, Array]:
        inputs = []
        for name, elements in given.items():
            tensor = server_client.InferInput(name, list(elements.shape), "BYTES")
            tensor.set_data_from_numpy(elements)
            inputs.append(tensor)
        context = current()
        call = asyncio.create_task(
            server.client.infer(
                model,
                inputs,
                request_id=context.request_id if context else "",
                headers={"traceparent": context.traceparent} if context and context.traceparent else None,
                outputs=[server_client.InferRequestedOutput(name) for name in outputs],
                parameters=dict(parameters) or None,
                client_timeout=self._timeout_s,
            )
        )
        calls = self._calls.setdefault((server.address, pipeline.ensemble_of(model)), set())
        calls.add(call)
        call.add_done_callback(calls.discard)
        try:
            await asyncio.wait([call])
        except asyncio.CancelledError:
            # An ensemble computes what it has taken in, cancelled or not (server 2.51), and new work in
            # its place would come on top. Canaries and single stages take no place.
            if context is None or model in pipeline.steps:
                call.cancel()
            await asyncio.wait([call])
            if call.cancelled() or call.exception() is not None:
                raise
        if call.cancelled():
            raise _not_answering(pipeline.served_model_name)
        try:
            result = call.result()
        except InferenceServerException as error:
            raise self._explain(error, pipeline.served_model_name) from error
        self._last_success[model] = time.monotonic()
        return {name: result.as_numpy(name) for name in outputs}

    def _tell(self, address: str, ensemble: str, is_first: bool) -> None:
        """Ends the wait for a process that died: what it had taken in is answered by nobody (server 2.51)."""
        for call in self._calls.get((address, ensemble), ()):
            call.cancel()

    def last_success(self, pipeline: Pipeline) -> float | None:
        text, image, both = (
            self._last_success.get(entry, _NEVER)
            for entry in (
                pipeline.name,
                pipeline.entry("image"),
                multimodal_name(pipeline.name),
            )
        )
        last = max(text, both)
        if pipeline.takes_images:
            last = min(last, max(image, both))
        return None if last == _NEVER else last

    async def close(self) -> None:
        for task in [*self._stays, *(call for calls in self._calls.values() for call in calls)]:
            task.cancel()
        await asyncio.gather(*self._stays, return_exceptions=True)
        await asyncio.gather(*(server.close() for server in self.servers))

    def _explain(self, error: InferenceServerException, subject: str) -> GatewayError:
        """A status of the server -> the error that the client sees."""
        status = error.status() or ""
        message = error.message() or ""
        failure = StageFailure.parse(message)
        if failure is not None and failure.code is ErrorCode.OUT_OF_MEMORY:
            logger.warning("%s: %s", subject, message)
            return Unavailable(f"{subject}: {failure.message}")
        if failure is not None and failure.code is ErrorCode.DEADLINE_EXCEEDED:
            limit = time_limit(self._timeout_s)
            return TimedOut(f"{subject}: {failure.message}") if limit is None else limit.error(subject)
        if failure is not None and failure.code is not ErrorCode.INTERNAL:
            return RefusedItem(failure.message, item=failure.item, reason=failure.code)
        if SHARED_MEMORY_FULL in message:
            logger.warning("%s: %s", subject, message)
            return _no_shared_memory(subject)
        if failure is None and DEAD_STUB.search(message):
            logger.debug("%s: %s", subject, message)
            return _not_answering(subject)
        if status == _status(grpc.StatusCode.DEADLINE_EXCEEDED):
            return TimedOut(
                f"{subject} did not answer within {self._timeout_s:g} s; send fewer or shorter inputs"
            )
        if status == _status(grpc.StatusCode.NOT_FOUND) or (
            status == _status(grpc.StatusCode.UNAVAILABLE) and NOT_LOADED.search(message)
        ):
            lost = ModelLost(f"the model {subject} is not loaded at the moment; try again in a while")
            lost.is_unloaded = True
            return lost
        if status == _status(grpc.StatusCode.UNAVAILABLE):
            logger.debug("%s: %s", subject, message)
            return ModelLost("the inference server cannot be reached at the moment; try again in a while")
        # What a stage's exception says may be a piece of a text.
        logger.error(
            "%s: %s %s", subject, status, _PYTHON_FAULT.sub("(the server's log tells more)", message)
        )
        return ServerFault("the model failed on this request; the server's log tells why")


async def _answers_in_time(
    questions: Sequence[Coroutine[Any, Any, list[Pipeline]]],
) -> list[list[Pipeline] | BaseException]:
    """What each gives or raises, in order; without those that others need not wait for."""
    tasks = [asyncio.create_task(question) for question in questions]
    try:
        done, slow = await asyncio.wait(tasks, timeout=_OTHERS_LIST_TIMEOUT_S)
        while slow and all(task.exception() for task in done):
            more, slow = await asyncio.wait(slow, return_when=asyncio.FIRST_COMPLETED)
            done |= more
    finally:
        for task in tasks:
            task.cancel()
    return [task.exception() or task.result() for task in tasks if task in done]


async def _all_or_fault(
    infer_part: Callable[[Part], Coroutine[Any, Any, dict[str, Array]]], parts: Sequence[Part]
) -> list[dict[str, Array] | RefusedItem]:
    """What each gives, or why it is refused. What fails for another reason than an item ends the others, for
    nobody waits for them.
    """
    if len(parts) == 1:
        # Most requests; they need no task of their own.
        try:
            return [await infer_part(parts[0])]
        except RefusedItem as error:
            return [error]
    tasks: list[asyncio.Task[dict[str, Array]]] = []
    faults: list[Exception] = []

    async def run(part: Part) -> dict[str, Array]:
        try:
            return await infer_part(part)
        except RefusedItem:
            raise
        except Exception as fault:
            faults.append(fault)
            for other in tasks if len(faults) == 1 else ():
                other.cancel()
            raise

    tasks.extend(asyncio.create_task(run(part)) for part in parts)
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    if faults:
        raise faults[0]
    return [answer for answer in answers if isinstance(answer, (dict, RefusedItem))]


def _not_answering(subject: str) -> ModelLost:
    return ModelLost(f"the model {subject} does not answer at the moment; try again in a while")


def _no_shared_memory(subject: str) -> Unavailable:
    return Unavailable(
        f"{subject}: the inference server's /dev/shm has no room for so many inputs at the moment; send "
        "fewer or shorter ones at a time, or try again in a while (the operator can give the container more "
        "of it with --shm-size, or lower --max-batch-tokens)"
    )


def _too_large(max_bytes: int) -> AnswerTooLarge:
    return AnswerTooLarge(
        f"the answer would hold more than {max_bytes} bytes of numbers; send fewer or shorter inputs at a "
        "time (the operator can raise the limit with GATEWAY_MAX_ANSWER_BYTES)"
    )


def _status(code: grpc.StatusCode) -> str:
    return f"StatusCode.{code.name}"


def _entry(pipeline: Pipeline, stage: str | None, *, has_images: bool) -> str:
    """Who answers a server request."""
    if stage is not None:
        return pipeline.entry(stage)
    return multimodal_name(pipeline.name) if has_images else pipeline.name


def _times(pipeline: Pipeline, stage: str | None, *, has_images: bool) -> tuple[str, ...]:
    """The outputs that say what a server request's time is spent on."""
    if stage is not None or not pipeline.tells_times:
        return ()
    return (TOKENIZER_TIMES, ENCODER_TIMES, *((IMAGE_TIMES,) if has_images else ()))


def _record(began: float, sent: float, answer: dict[str, Array], stage: str | None) -> None:
    """Takes the times out of an answer, and adds them to the request's phases."""
    received = time.monotonic()
    told = {name: answer.pop(name) for name in phases.TIMES & answer.keys()}
    if (context := current()) is None:
        return
    of_stage = {phases.TOKENISE if stage == "tokenizer" else phases.IMAGE: received - sent}
    spent = of_stage if stage is not None else phases.read_times(told, sent, received)
    phases.record(context, began, received, {phases.ADMISSION: sent - began, **spent})


def _place(error: RefusedItem, part: Part) -> RefusedItem:
    """A refused item's place in a server request -> its place in the client's list."""
    if error.item is None:
        return error
    return RefusedItem(error.message, item=part.places[error.item], reason=error.reason)
