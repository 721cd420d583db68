"""The way to the inference servers, over one long-lived gRPC channel each: which of them is asked, and which
next where the first met a process that died.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import grpc
import tritonclient.grpc.aio as server_client
from tritonclient.utils import InferenceServerException

from backends.contract import multimodal_name, stage_of
from gateway.availability import Availability
from gateway.batches import Array
from gateway.context import current
from gateway.errors import GatewayError, ModelLost, Unavailable
from gateway.inference_server import InferenceServer, has_status
from gateway.pipeline import Pipeline
from gateway.server_errors import explain, not_answering

Parameters = Mapping[str, str | int | bool]

# A list takes milliseconds, also of a server that computes or loads, but seconds where it gets no processor.
# One that stands still holds up what another has answered for the first time only.
_OTHERS_LIST_TIMEOUT_S = 2.0
_LIST_TIMEOUT_S = 10.0
# Of a request that met a dead process it is tried once more.
_ATTEMPTS = 2
_NEVER = float("-inf")


class ServerCalls:
    """To one server, or to several that serve the same."""

    def __init__(self, addresses: Sequence[str], timeout_s: float, repair_wait_s: float) -> None:
        """`addresses`: host:port of each server. Requests wait for a model that was lost until
        `repair_wait_s` after its loss.
        """
        self.servers = [InferenceServer(address) for address in addresses]
        self.availability = Availability(repair_wait_s, [self._tell])
        self._timeout_s = timeout_s
        self._last_success: dict[str, float] = {}
        self._known: dict[str, Pipeline] = {}
        # Calls to the servers, by server and ensemble; a cancelled one met a process that died.
        self._calls: dict[tuple[str, str], set[asyncio.Task[Any]]] = {}

    async def pipelines(self) -> list[Pipeline]:
        """The models that are loaded. Raises GatewayError."""
        answers = await _answers_in_time(
            [server.pipelines(self._known, _LIST_TIMEOUT_S) for server in self.servers]
        )
        lists = [answer for answer in answers if isinstance(answer, list)]
        if not lists:
            error = next(answer for answer in answers if isinstance(answer, BaseException))
            if not isinstance(error, InferenceServerException):
                raise error
            if has_status(error, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise Unavailable(
                    f"the inference server did not list its models within {_LIST_TIMEOUT_S:g} s; try again "
                    "in a while"
                ) from error
            raise explain(error, self.servers[0].address, self._timeout_s) from error
        # Where two servers do not agree, as while one of them is being given new weights, the first counts.
        found = {pipeline.name: pipeline for pipelines in reversed(lists) for pipeline in pipelines}
        self._known = found
        return sorted(found.values(), key=lambda pipeline: pipeline.name)

    async def ask(
        self,
        pipeline: Pipeline,
        model: str,
        given: Mapping[str, Array],
        outputs: Sequence[str],
        parameters: Parameters,
    ) -> dict[str, Array]:
        """One server request to an entry of the pipeline; another where the first met a dead process.

        Raises GatewayError.
        """
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
            raise not_answering(pipeline.served_model_name)
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
            raise not_answering(pipeline.served_model_name)
        try:
            result = call.result()
        except InferenceServerException as error:
            raise explain(error, pipeline.served_model_name, self._timeout_s) from error
        self._last_success[model] = time.monotonic()
        return {name: result.as_numpy(name) for name in outputs}

    def _tell(self, address: str, ensemble: str, is_first: bool) -> None:
        """Ends the wait for a process that died: what it had taken in is answered by nobody (server 2.51)."""
        for call in self._calls.get((address, ensemble), ()):
            call.cancel()

    def last_success(self, pipeline: Pipeline) -> float | None:
        """See Inference."""
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

    def cancel(self) -> None:
        """Ends all calls."""
        for calls in self._calls.values():
            for call in calls:
                call.cancel()

    async def close(self) -> None:
        """Gives the connections back."""
        await asyncio.gather(*(server.close() for server in self.servers))


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
