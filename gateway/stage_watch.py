"""Knows of every stage of every model, on every server, whether its process answers, and has those replaced
that do not.

A stage is pinged several times a second, past the models' queues where it can be: the encoder takes a ping in
however much it computes. Other stages compute while they are asked, so one that is silent is believed as long
as the server counts answers of it. What of an encoder a ping does not tell, `encoder_canary.py` does. A
process that died or was halted is told by the server, 1 s after a ping (2.51); on the server's own machine a
death is seen at once, and a halt while a ping waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from backends.contract import stage_of
from gateway.availability import Availability
from gateway.catalog import Catalog
from gateway.encoder_canary import EncoderCanary
from gateway.errors import GatewayError
from gateway.inference_server import InferenceServer, Pulse
from gateway.local_stubs import find_stubs, stand_still
from gateway.pipeline import Pipeline
from gateway.repair import Repairs

logger = logging.getLogger(__name__)

# Stages that take requests in and compute beside: a ping never waits for what is computed.
_TAKE_IN_AT_ONCE = frozenset({"encoder"})
# A process that is stopped whenever one looks, so often in a row and so far apart, while it should answer, is
# not waited for. One that is held down by being stopped for moments goes on in between.
_LOOKS = 4
_LOOK_EVERY_S = 0.1
_NEVER = float("-inf")


@dataclass
class _Watched:
    """What is known of one entry at one server."""

    server: InferenceServer
    pipeline: Pipeline
    entry: str
    pulse: Pulse = Pulse.ALIVE
    alive_at: float = _NEVER
    """When the last ping was sent that was answered."""
    answers: int | None = None
    """The server's count at the last look at a silent stage."""
    silent_since: float | None = None
    processes: dict[int, int] = field(default_factory=dict)
    """Process id -> descriptor that tells its end."""
    has_ended: bool = False
    """Whether one of these has."""
    is_looked_for: bool = False
    """Whether its processes were looked for: of a server on another machine there are none to be found."""
    task: asyncio.Task[None] | None = None
    canary: EncoderCanary | None = None
    """Of an encoder."""
    canary_task: asyncio.Task[None] | None = None
    is_unwell: bool = False
    """Whether its canary says so."""


class StageWatch:
    """Runs for the lifetime of the gateway."""

    def __init__(
        self,
        servers: Sequence[InferenceServer],
        catalog: Catalog,
        availability: Availability,
        *,
        interval_s: float,
        hang_timeout_s: float,
        patience_s: float,
    ) -> None:
        """Every stage is asked each `interval_s`. One that should answer at once hangs after `hang_timeout_s`
        without an answer; one that computes meanwhile after `patience_s` in which it has answered nothing.
        """
        self._servers = servers
        self._catalog = catalog
        self._availability = availability
        self._interval_s = interval_s
        self._hang_timeout_s = hang_timeout_s
        self._patience_s = patience_s
        self._repairs = Repairs()
        self._watched: dict[tuple[str, str], _Watched] = {}
        self._alarm = asyncio.Event()
        availability.on_loss.append(self._hear)

    def alarm(self) -> None:
        """Somebody met a fault: all stages are asked at once."""
        self._alarm.set()

    def _hear(self, address: str, ensemble: str, is_first: bool) -> None:
        """Somebody says that an ensemble is lost."""
        if is_first:
            self.alarm()

    def fault(self, pipeline: Pipeline) -> str | None:
        """Why no server answers for a model, or for what of it takes images; None where one does, or where
        nobody has looked.
        """
        for ensemble in pipeline.ensembles:
            losses = [self._availability.loss(server.address, ensemble) for server in self._servers]
            reasons = [loss.reason for loss in losses if loss is not None]
            if reasons and len(reasons) == len(losses):
                return reasons[0]
        return None

    async def run(self) -> None:
        """Asks for ever."""
        try:
            while True:
                self._alarm.clear()
                self._look()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_s):
                        await self._alarm.wait()
        finally:
            for one in self._watched.values():
                self._forget(one)

    def _look(self) -> None:
        """Starts asking whoever is not being asked."""
        wanted = {
            (server.address, entry): (server, pipeline, entry)
            for server in self._servers
            for pipeline in self._catalog.pipelines
            for entry in pipeline.steps
        }
        for key in self._watched.keys() - wanted.keys():
            self._forget(self._watched.pop(key))
        for key, (server, pipeline, entry) in wanted.items():
            if (one := self._watched.get(key)) is None:
                one = self._watched[key] = _Watched(server, pipeline, entry)
                if stage_of(pipeline.name, entry) in _TAKE_IN_AT_ONCE:
                    one.canary = EncoderCanary(self._patience_s)
            one.pipeline = pipeline
            if one.task is None or one.task.done():
                one.task = asyncio.create_task(self._ask(one))

    async def _ask(self, one: _Watched) -> None:
        try:
            await self._check(one)
        except Exception:
            # The watch goes on, whatever one look met.
            logger.exception("the look at %s failed", one.entry)

    async def _check(self, one: _Watched) -> None:
        started = time.monotonic()
        one.pulse = await self._pulse(one)
        if one.pulse is Pulse.ALIVE:
            one.alive_at = started
            self._repairs.recovered(one.server.address, one.entry)
            await self._know_processes(one)
            await self._regain(one)
            self._start_canary(one)
            return
        is_server_s = one.pulse in (Pulse.UNREACHABLE, Pulse.HALTED)
        if not is_server_s and not await self._is_served(one):
            # Unloaded by a person: that its process ended is no fault.
            return
        self._lose(one)
        if is_server_s:
            self._forget_processes(one)
        elif await self._repairs.replace(one.server, one.entry, lambda: self._is_gone(one)):
            self._forget_processes(one)
            self._alarm.set()

    def _start_canary(self, one: _Watched) -> None:
        is_asked = one.canary_task is not None and not one.canary_task.done()
        if one.canary is not None and one.canary.is_due and not is_asked:
            one.canary_task = asyncio.create_task(self._look_at_canary(one, one.canary))

    async def _look_at_canary(self, one: _Watched, canary: EncoderCanary) -> None:
        try:
            one.is_unwell = await canary.look(one.server, one.pipeline, one.entry) is Pulse.UNWELL
        except Exception:
            logger.exception("the canary of %s failed", one.entry)
        if one.is_unwell:
            self.alarm()

    async def _is_served(self, one: _Watched) -> bool:
        """Whether the entry belongs to a model as the server describes it now."""
        with contextlib.suppress(GatewayError):
            await self._catalog.refresh()
        return any(one.entry in pipeline.steps for pipeline in self._catalog.pipelines)

    async def _pulse(self, one: _Watched) -> Pulse:
        """Of a stage that computes while it is asked, alive as long as its answers become more."""
        if one.has_ended:
            return Pulse.DEAD
        if one.is_unwell:
            return Pulse.UNWELL
        pulse = await self._ping(one)
        if pulse is not Pulse.SILENT or stage_of(one.pipeline.name, one.entry) in _TAKE_IN_AT_ONCE:
            one.silent_since = None
            return pulse
        answers = await one.server.answer_count(one.entry)
        now = time.monotonic()
        if one.silent_since is None or answers != one.answers:
            one.silent_since, one.answers = now, answers
        return Pulse.ALIVE if now - one.silent_since < self._patience_s else Pulse.SILENT

    async def _ping(self, one: _Watched) -> Pulse:
        ping = asyncio.ensure_future(one.server.ping(one.entry, self._hang_timeout_s))
        try:
            for _ in range(_LOOKS):
                await asyncio.wait([ping], timeout=_LOOK_EVERY_S)
                if ping.done() or not stand_still(one.processes):
                    return await ping
            # With a server that is halted its stages may be: then none of them is to blame.
            return Pulse.DEAD if await one.server.is_live() else await ping
        finally:
            ping.cancel()

    async def _is_gone(self, one: _Watched) -> bool:
        """Asked when nobody else can replace it: another gateway may just have done so."""
        state = await one.server.state(one.entry)
        if state is None:
            # The server died with its stages, and who starts it again brings them back.
            is_gone = False
        elif state == "READY" and (one.has_ended or one.is_unwell):
            now = await asyncio.to_thread(find_stubs, one.server.address, one.entry)
            is_gone = not set(now) - one.processes.keys()
        elif state == "READY" and await asyncio.to_thread(stand_still, list(one.processes)):
            # Those that were not healthy, for had they been replaced they had ended. A second ping would take
            # another second.
            is_gone = True
        elif state == "READY":
            pulse = await one.server.ping(one.entry, self._hang_timeout_s)
            is_gone = pulse in (Pulse.DEAD, Pulse.SILENT, Pulse.UNWELL)
        else:
            # Not while somebody loads it, nor where the repository has no such entry.
            is_gone = state == "UNAVAILABLE" and await self._is_served(one)
        # Its processes will end, or have been replaced.
        self._forget_processes(one)
        return is_gone

    def _lose(self, one: _Watched) -> None:
        over = [name for name, steps in one.pipeline.ensembles.items() if one.entry in steps]
        if any(self._availability.loss(one.server.address, name) is None for name in over):
            logger.warning("%s at %s: %s", one.entry, one.server.address, one.pulse)
        failure = self._repairs.failure(one.server.address, one.entry)
        stage = stage_of(one.pipeline.name, one.entry)
        reason = (
            one.pulse.value
            if one.pulse in (Pulse.UNREACHABLE, Pulse.HALTED)
            else f"its stage {stage} cannot be loaded anew: {failure}"
            if failure
            else f"its stage {stage} is being loaded anew: {one.pulse}"
        )
        for name in over:
            self._availability.lose(one.server.address, name, reason)

    async def _regain(self, one: _Watched) -> None:
        """An ensemble is back when each of its stages has answered a ping that was sent after the last bad
        sign.
        """
        server = one.server
        for name, steps in one.pipeline.ensembles.items():
            loss = self._availability.loss(server.address, name)
            if loss is None:
                continue
            others = [self._watched.get((server.address, entry)) for entry in steps]
            if not all(other and other.alive_at > loss.last_seen for other in others):
                continue
            if await server.is_loaded(name) and self._availability.loss(server.address, name) == loss:
                self._availability.regain(server.address, name)
                logger.warning("%s at %s answers again", name, server.address)

    async def _know_processes(self, one: _Watched) -> None:
        """Has the end of the entry's processes told at once, where they run on this machine."""
        if one.is_looked_for:
            return
        one.is_looked_for = True
        loop = asyncio.get_running_loop()
        for pid in await asyncio.to_thread(find_stubs, one.server.address, one.entry):
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(pid)
                one.processes[pid] = descriptor
                loop.add_reader(descriptor, self._process_ended, one, pid)

    def _process_ended(self, one: _Watched, pid: int) -> None:
        _close([one.processes.pop(pid)])
        one.has_ended = True
        if one.task is not None:
            # It may wait for an answer of the process that has just ended.
            one.task.cancel()
            one.task.add_done_callback(lambda _: self.alarm())

    def _forget(self, one: _Watched) -> None:
        if one.task is not None:
            one.task.cancel()
        self._forget_processes(one)

    def _forget_processes(self, one: _Watched) -> None:
        _close(one.processes.values())
        one.processes.clear()
        one.has_ended = False
        one.is_looked_for = False
        one.is_unwell = False
        # A verdict would be of a process that is no more.
        if one.canary_task is not None:
            one.canary_task.cancel()


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
