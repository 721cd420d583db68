"""A client request as the server requests that it is cut into, sent at once, each when it is its turn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from backends.contract import (
    COUNT_OF,
    DENSE,
    ENCODER_TIMES,
    IMAGE_TIMES,
    SPARSE_INDICES,
    SPARSE_WEIGHTS,
    TOKEN_EMBEDDINGS,
    TOKEN_VECTORS,
    TOKENIZER_TIMES,
    RequestParameter,
    multimodal_name,
)
from gateway import byte_budget, phases
from gateway.admission import Admission, AdmissionLimits
from gateway.batches import Answer, Array, Item, Part, cut, merge, size, tensors
from gateway.charge import charged, check
from gateway.context import Held, current
from gateway.errors import (
    AnswerTooLarge,
    RefusedItem,
    TimedOut,
)
from gateway.lane import FreePass, Price, Ticket
from gateway.pipeline import Pipeline
from gateway.server_calls import Parameters, ServerCalls
from gateway.urgency import time_limit

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_LARGE = frozenset({TOKEN_VECTORS, TOKEN_EMBEDDINGS})
_LARGE_PARTS = 4
# A vector for each token of a few sentences.
_SURELY_LARGE = 2**20
# Enough to keep the image stage and the encoder busy.
_IMAGE_PARTS = 8
# Of a long query that goes with each of thousands of documents only so much is in flight at once.
_LARGE_REQUEST_BYTES = 32 * 2**20
# A sparse weight becomes an object of 40 characters, four times what it takes of a dense vector.
_JSON_WEIGHT = {SPARSE_INDICES: 4, SPARSE_WEIGHTS: 4}


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
        max_answer_bytes_total: int = 512 * 2**20,
    ) -> None:
        """`addresses`: host:port of each server. Requests wait for a model that was lost until
        `repair_wait_s` after its loss. Of one answer so many bytes may be held, and of all.
        """
        self.admission = Admission(limits or AdmissionLimits())
        self.calls = ServerCalls(addresses, timeout_s, repair_wait_s)
        self.servers = self.calls.servers
        self.availability = self.calls.availability
        self._timeout_s = timeout_s
        self._max_answer_bytes = max_answer_bytes
        self.answers = byte_budget.answers(max_answer_bytes_total)
        self._image_turns: dict[str, asyncio.Semaphore] = {}
        # Server requests with their turns; some are there when their clients have gone.
        self._stays: set[asyncio.Task[Any]] = set()

    def _turn(
        self, pipeline: Pipeline, stage: str | None, part: Part
    ) -> contextlib.AbstractAsyncContextManager[None]:
        """Of items with images each server has few requests under way for all clients together: the encoder
        takes all that wait at once, and a text among them waits for all.
        """
        if stage is not None or not part.has_images:
            return contextlib.nullcontext()
        turns = asyncio.Semaphore(_IMAGE_PARTS * len(self.servers))
        return self._image_turns.setdefault(pipeline.name, turns)

    async def pipelines(self) -> list[Pipeline]:
        return await self.calls.pipelines()

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
        held = self._hold(_expected_bytes(pipeline, len(items), outputs))
        answered = 0
        began = time.monotonic()

        async def stay(part: Part) -> tuple[float, dict[str, Array]]:
            own = [items[i] for i in part.places]
            model = _entry(pipeline, stage, has_images=part.has_images)
            told = _times(pipeline, stage, has_images=part.has_images)
            async with ticket.turn(part.tokens, part.size), self._turn(pipeline, stage, part):
                sent = time.monotonic()
                given = tensors(own, stage)
                return sent, await self.calls.ask(pipeline, model, given, [*asked, *told], parameters)

        async def infer_part(part: Part) -> dict[str, Array]:
            nonlocal answered
            async with gate:
                if answered > self._max_answer_bytes:
                    raise _too_large(self._max_answer_bytes)
                if held is not None:
                    held.check()
                sent, answer = await self._outlive(stay(part))
                _record(began, sent, answer, stage)
                size = sum(array.nbytes * _JSON_WEIGHT.get(name, 1) for name, array in answer.items())
                answered += size
                if answered > self._max_answer_bytes:
                    raise _too_large(self._max_answer_bytes)
                if held is not None:
                    held.add(size)
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

    def _hold(self, expected: int) -> Held | None:
        """Of the answer of the request that runs; None outside of one. Raises Unavailable where others leave
        no room for so many bytes.
        """
        if (context := current()) is None:
            return None
        if context.answer is None:
            context.answer = self.answers.enter()
        context.answer.check(expected)
        return context.answer

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
        ensembles = {_entry(pipeline, None, has_images=part.has_images) for part in parts}
        able = sum(
            all(self.availability.loss(server.address, name) is None for name in ensembles)
            for server in self.servers
        )
        queue = self.admission.queue(
            pipeline.name,
            pipeline.served_model_name,
            pipeline.max_batch_tokens,
            max(1, able),
        )
        price = Price(sum(part.tokens for part in parts), sum(part.size for part in parts))
        check(context)
        with (
            queue.enter(price, context.lane, lambda: hash((tuple(items), tuple(outputs)))) as ticket,
            charged(context, price.tokens, lambda: ticket.sent),
        ):
            context.lane_taken = ticket.lane
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

    def last_success(self, pipeline: Pipeline) -> float | None:
        return self.calls.last_success(pipeline)

    async def close(self) -> None:
        for task in self._stays:
            task.cancel()
        # What still waits for a server ends with its call.
        self.calls.cancel()
        await asyncio.gather(*self._stays, return_exceptions=True)
        await self.calls.close()


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


def _expected_bytes(pipeline: Pipeline, count: int, outputs: Sequence[str]) -> int:
    """Of an answer, as far as it is known before: at least."""
    if _LARGE & set(outputs):
        return _SURELY_LARGE
    return 4 * count * (pipeline.dimensions or 0) if DENSE in outputs else 0


def _too_large(max_bytes: int) -> AnswerTooLarge:
    return AnswerTooLarge(
        f"the answer would hold more than {max_bytes} bytes of numbers; send fewer or shorter inputs at a "
        "time (the operator can raise the limit with GATEWAY_MAX_ANSWER_BYTES)"
    )


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
