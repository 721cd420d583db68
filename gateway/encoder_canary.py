"""Whether an encoder still computes: it answers pings beside its computing threads, and so also when those
hang.

What its model answers shows that it does. Only where that becomes no more for a while is it asked itself, for
one token: a canary that waits behind others' work is no bad sign as long as their answers come.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from gateway.inference_server import InferenceServer, Pulse
from gateway.pipeline import Pipeline

# Of the patience, how often its answers are counted, and how long the token may take after that.
_LOOK_SHARE = 1 / 6
_WAIT_SHARE = 2 / 3
# An error may be of this one request; so many in a row are the encoder's.
_MOST_FAULTS = 3


@dataclass
class EncoderCanary:
    """Of one entry at one server."""

    patience_s: float
    """An encoder that is asked and answers nothing for so long has stopped."""
    _answers: int | None = None
    """Of its model, at the last look."""
    _again_at: float = 0.0
    """time.monotonic()."""
    _faults: int = 0

    @property
    def is_due(self) -> bool:
        """Whether it is time to look again."""
        return time.monotonic() >= self._again_at

    async def look(self, server: InferenceServer, pipeline: Pipeline, entry: str) -> Pulse:
        """UNWELL where the encoder has stopped; what else may be wrong with it, its pings tell."""
        answers = await server.success_count(pipeline.ensembles)
        if answers is None or answers != self._answers:
            self._answers, self._faults = answers, 0
            self._rest()
            return Pulse.ALIVE
        pulse = await server.encode(entry, self.patience_s * _WAIT_SHARE)
        if pulse is Pulse.SILENT:
            self._rest()
            is_stuck = await server.success_count(pipeline.ensembles) == answers
            return Pulse.UNWELL if is_stuck else Pulse.ALIVE
        if pulse is not Pulse.UNWELL:
            self._faults = 0
            self._rest()
            return Pulse.ALIVE
        self._faults += 1
        if self._faults < _MOST_FAULTS:
            return Pulse.ALIVE
        self._rest()
        # One that has failed since it was loaded is no better for being loaded anew.
        return Pulse.UNWELL if answers > 0 else Pulse.ALIVE

    def _rest(self) -> None:
        self._again_at = time.monotonic() + self.patience_s * _LOOK_SHARE
