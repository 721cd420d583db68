"""A child process that is started again when it ends, later and later, and not for ever."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from triton_embeddings.errors import CommandError
from triton_embeddings.heartbeat import Heartbeat
from triton_embeddings.process import Child, Stop

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 10.0
# A process that ends so often within this time will not mend itself.
_MOST_DEATHS = 5
_DEATHS_WITHIN_S = 60.0


class Supervised:
    """Looks after one child; `look` is called every moment."""

    def __init__(
        self,
        start: Callable[[], Child],
        stop: Stop,
        explain: Callable[[Child], str],
        clear: Callable[[], None] = lambda: None,
        heartbeat: Heartbeat | None = None,
        worn_out: Callable[[int], str | None] = lambda pid: None,
    ) -> None:
        """`explain` says why a child ended; `clear` takes away what a dead one left behind. A child whose
        `heartbeat` has stopped is killed, and so is one of which `worn_out`, given its process id, says why;
        that does not count as a death.
        """
        self._start = start
        self._stop = stop
        self._explain = explain
        self._clear = clear
        self._heartbeat = heartbeat
        self._worn_out = worn_out
        self._deaths: list[float] = []
        self._again_at: float | None = None
        self._killed_for: str | None = None
        self._is_worn_out = False
        self.child = stop.watch_over(start())

    def look_at_start(self) -> None:
        """Before the child was ever of use: what ends by itself does so for a reason that stays. Only where
        it was killed or crashed another is tried, once.

        Raises CommandError.
        """
        self._look(is_start=True)

    def look(self) -> None:
        """Starts the child again where it has ended and its pause is over.

        Raises CommandError when it ends too often.
        """
        self._look(is_start=False)

    def _look(self, *, is_start: bool) -> None:
        now = time.monotonic()
        if self._again_at is not None:
            if now >= self._again_at:
                self._again_at = None
                self.child = self._stop.watch_over(self._start())
            return
        code = self.child.exit_code
        if code is None:
            if self._killed_for is None:
                self._judge()
            return
        reason = self._killed_for or self._explain(self.child)
        if is_start and not self._is_worn_out and (code >= 0 or self._deaths):
            raise CommandError(reason)
        told = f"{self.child.name} was killed" if self._killed_for else reason
        # What a dead server has started lives on, and holds memory.
        self._stop.forget(self.child)
        self.child.kill()
        self._clear()
        self._deaths = [at for at in self._deaths if now - at < _DEATHS_WITHIN_S]
        if not self._is_worn_out:
            self._deaths.append(now)
        if len(self._deaths) >= _MOST_DEATHS:
            raise CommandError(f"{reason}; it ended {_MOST_DEATHS} times within {_DEATHS_WITHIN_S:g} s")
        backoff = min(_FIRST_BACKOFF_S * 2 ** max(len(self._deaths) - 1, 0), _LONGEST_BACKOFF_S)
        logger.warning("%s; starting it again in %g s", told, backoff)
        self._again_at = now + backoff
        self._killed_for, self._is_worn_out = None, False

    def _judge(self) -> None:
        """Kills what runs but is of no use."""
        if self._heartbeat is not None and self._heartbeat.has_stopped:
            self._heartbeat.reset()
            self._killed_for = f"{self.child.name} takes connections but has answered none for 10 s"
        elif reason := self._worn_out(self.child.pid):
            self._killed_for, self._is_worn_out = reason, True
        if self._killed_for:
            logger.warning("%s; killing it", self._killed_for)
            self.child.kill()

    def stop(self, timeout_s: float) -> None:
        """Asks the child to end, waits, and kills what is left."""
        self.child.stop(timeout_s)
