"""A stage that computes without end while the server hands it more: requests that come in during one turn
share the next, and a short one does not wait until a long one is done.

execute() only takes requests in and returns at once; threads of its own compute, and answer each request
when its last sequence is done (server 2.51 lets a model that is not decoupled answer later, also within an
ensemble).
"""

from __future__ import annotations

import logging
import threading
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from backends.clock import now_us
from backends.contract import ENCODER_TIMES, ErrorCode
from backends.errors import RequestError
from backends.stages.base import Stage
from backends.stages.request import StageRequest
from backends.stages.response import Answer, failed, out_of_memory
from backends.tally import Count, Tally
from backends.turns import Job, Piece, Turns, halve

logger = logging.getLogger(__name__)

# A request that is still computed when the server unloads the model keeps it from ending so long at most.
_LAST_WORDS_S = 60.0
# By then everybody who waits has gone away: it is three times the gateway's own default. A full turn of
# 16 384 tokens of a model of four billion parameters takes two cores 11 minutes, if nothing else runs.
_STUCK_AFTER_S = 900.0


@dataclass
class Work:
    """A request that was taken in. Subclasses hold its inputs, and what is done so far."""

    request: StageRequest
    is_answered: bool = field(default=False, init=False)
    came_us: int = field(default_factory=now_us, init=False)
    begun_us: int = field(default=0, init=False)
    done_us: int = field(default=0, init=False)


W = TypeVar("W", bound=Work)


class ContinuousStage(Stage, Generic[W]):
    """Subclasses say how many tokens the sequences of a request have, and compute some of them."""

    turns: Turns[W]
    """Set by setup()."""
    workers = 1
    """Threads that compute; setup() may set it."""
    stuck_after_s = _STUCK_AFTER_S
    """A pass that takes longer will never end; setup() may set it."""

    def initialize(self, args: Mapping[str, str]) -> None:
        self.tally = Tally()
        self._news = threading.Condition()
        self._results = threading.Lock()
        self._is_over = False
        self._busy: set[int] = set()
        # Of each thread that computes, when its pass began.
        self._began: dict[int, float] = {}
        is_ready: Future[None] = Future()
        # The model is loaded by the thread that computes. If another ran parallel loops too, libgomp would
        # count more threads than processors; then none of them waits actively, and short loops take twice as
        # long.
        first = threading.Thread(target=self._load_and_work, args=(args, is_ready), daemon=True)
        first.start()
        is_ready.result()
        others = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(1, self.workers)]
        for thread in others:
            thread.start()
        self._threads = [first, *others]

    @abstractmethod
    def admit(self, request: StageRequest) -> Job[W]:
        """Reads a request of at least one sequence. Raises RequestError for one that cannot be computed."""

    @abstractmethod
    def compute(self, pieces: Sequence[Piece[W]]) -> Sequence[Any]:
        """What came out for each piece."""

    @abstractmethod
    def keep(self, piece: Piece[W], result: Any) -> Answer | None:
        """Puts a result to those of the same request before it; the answer when it was the last."""

    def finish(self, works: Sequence[W], answers: Sequence[Answer]) -> Sequence[Answer | RequestError]:
        """What is answered to the requests that one turn has finished, in order; as it was kept, unless a
        stage does more to it.
        """
        return answers

    def prepare(self, worker: int, *, is_alone: bool) -> None:
        """Called by a thread before it computes; `is_alone` where no other does, and nothing waits."""

    def run(self, batch: Sequence[StageRequest]) -> list[Answer | RequestError]:
        raise NotImplementedError("requests are taken in and answered later")

    def execute(self, requests: Sequence[Any]) -> list[None]:
        """Called by the server with the requests of one batch, which are answered later."""
        for one in requests:
            request = StageRequest(one)
            if request.is_ping:
                self.answer_ping(request)
                continue
            try:
                request.check_deadline()
                job = self.admit(request)
            except RequestError as error:
                if error.failure.code is ErrorCode.DEADLINE_EXCEEDED:
                    self.tally.add(Count.EXPIRED)
                self.respond(request, error)
                continue
            with self._news:
                self.turns.add(job)
                self._news.notify_all()
        return [None] * len(requests)

    def find_ailment(self) -> str | None:
        dead = sum(not thread.is_alive() for thread in self._threads)
        if dead and not self._is_over:
            return f"{dead} of its {len(self._threads)} threads have ended"
        longest = max((time.monotonic() - began for began in list(self._began.values())), default=0.0)
        if longest > self.stuck_after_s:
            return f"one pass has been computed for {longest:.0f} s, more than {self.stuck_after_s:g} s"
        return self.ailment

    def finalize(self) -> None:
        """Called by the server before it ends the process: what was taken in is answered."""
        with self._news:
            self._is_over = True
            self._news.notify_all()
        for thread in self._threads:
            thread.join(_LAST_WORDS_S)

    def _load_and_work(self, args: Mapping[str, str], is_ready: Future[None]) -> None:
        try:
            super().initialize(args)
        except BaseException as error:
            is_ready.set_exception(error)
            return
        is_ready.set_result(None)
        self._work(0)

    def _work(self, worker: int) -> None:
        while pieces := self._next(worker):
            for piece in pieces:
                piece.job.content.begun_us = piece.job.content.begun_us or now_us()
            try:
                self._compute(pieces)
            except Exception:
                # The thread must live: others' requests wait for it.
                logger.exception("a turn of %d requests failed, and they failed one by one", len(pieces))
                with self._news:
                    self.turns.drop([piece.job for piece in pieces])
                for piece in pieces:
                    self._respond(piece.job.content, failed())
            self._began.pop(threading.get_ident(), None)
            # Inputs live in the server's shared memory until nobody holds them.
            del pieces

    def _next(self, worker: int) -> list[Piece[W]]:
        """Waits for a turn; empty when all is over. The first worker has precedence: it may use all cores."""
        while True:
            with self._news:
                self._busy.discard(worker)
                self._news.wait_for(
                    lambda: self._is_over or (len(self.turns) and (worker == 0 or 0 in self._busy))
                )
                late = self._drop_late()
                pieces = self.turns.take()
                is_over = self._is_over and not pieces
                is_alone = not self._busy and not len(self.turns)
                if pieces:
                    self._busy.add(worker)
                self._news.notify_all()
            for work, error in late:
                self._respond(work, error)
            if pieces:
                self.prepare(worker, is_alone=is_alone)
            if pieces or is_over:
                return pieces

    def _drop_late(self) -> list[tuple[W, RequestError]]:
        """Takes what is past its deadline out of the turns, begun or not, and says why. Of a client that has
        gone away the server says nothing here (2.51: is_cancelled() stays false in the steps of an ensemble).
        """
        late: list[tuple[Job[W], RequestError]] = []
        for job in self.turns:
            try:
                job.content.request.check_deadline()
            except RequestError as error:
                late.append((job, error))
        if late:
            logger.info("dropping %d requests that are past their deadline", len(late))
            self.turns.drop([job for job, _ in late])
            self.tally.add(Count.EXPIRED, len(late))
        return [(job.content, error) for job, error in late]

    def _compute(self, pieces: Sequence[Piece[W]]) -> None:
        """Computes a turn and answers what it finishes; whatever fails is answered, too."""
        results: Sequence[Any] | None = None
        self._began[threading.get_ident()] = time.monotonic()
        try:
            results = self.compute(pieces)
            self._answer(pieces, results)
        except Exception as error:
            lacks_memory = self.is_out_of_memory(error)
            if not (lacks_memory and results is None):
                logger.exception("a turn of %d requests failed; computing them one by one", len(pieces))
        else:
            return
        # Out here the error, and all that its frames hold of the device, is gone.
        is_computed, results = results is not None, None
        if lacks_memory:
            self.free_memory()
        if lacks_memory and not is_computed:
            self._compute_in_halves(pieces)
            return
        for piece in pieces:
            if not piece.job.content.is_answered:
                self._compute_alone(piece.job)

    def _compute_in_halves(self, pieces: Sequence[Piece[W]]) -> None:
        """What the device had no room for as a whole; of what cannot be cut any more the request is
        refused.
        """
        halves = halve(pieces, is_whole=self.turns.is_whole)
        count = sum(int(piece.job.lengths[piece.places].sum()) for piece in pieces)
        if len(halves) == 2:
            logger.warning("no memory for a turn of %d tokens; computing it in halves", count)
            self.tally.add(Count.OUT_OF_MEMORY)
            for half in halves:
                self._compute(half)
            return
        logger.error("no memory for %d tokens, which cannot be computed in parts", count)
        job = pieces[0].job
        with self._news:
            self.turns.drop([job])
        self._respond(job.content, out_of_memory(f"{count} tokens"))

    def _answer(self, pieces: Sequence[Piece[W]], results: Sequence[Any]) -> None:
        works: list[W] = []
        kept: list[Answer] = []
        for piece, result in zip(pieces, results, strict=True):
            with self._results:
                answer = self.keep(piece, result)
            if answer is not None:
                piece.job.content.done_us = now_us()
                works.append(piece.job.content)
                kept.append(answer)
        if works:
            for work, finished in zip(works, self.finish(works, kept), strict=True):
                self._respond(work, finished)

    def _respond(self, work: W, answer: Answer | RequestError) -> None:
        with self._results:
            is_late, work.is_answered = work.is_answered, True
        if not is_late:
            if not isinstance(answer, RequestError):
                times = np.array([[work.came_us, work.begun_us, work.done_us]], np.int64)
                answer = {**answer, ENCODER_TIMES: times}
            self.respond(work.request, answer)

    def _compute_alone(self, job: Job[W]) -> None:
        """All of a request at once, whatever was done of it."""
        with self._news:
            self.turns.drop([job])
        whole = Piece(job, np.arange(len(job.lengths)))
        answer: Answer | RequestError
        self._began[threading.get_ident()] = time.monotonic()
        try:
            (result,) = self.compute([whole])
            kept = self.keep(whole, result)
            assert kept is not None
            job.content.done_us = now_us()
            (answer,) = self.finish([job.content], [kept])
        except RequestError as error:
            answer = error
        except Exception as error:
            logger.exception("request %s failed", job.content.request.id)
            if self.is_out_of_memory(error):
                answer = out_of_memory(f"{int(job.lengths.sum())} tokens")
            else:
                self.examine()
                answer = failed()
        self._respond(job.content, answer)
