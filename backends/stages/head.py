"""The head stage: hidden [1, t, h], length [1, n] -> the outputs of one head, a row for each text.

Or last_hidden [1, n, h], one token of each text.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from backends import device
from backends.contract import HIDDEN, LAST_HIDDEN, LENGTH
from backends.device import place
from backends.errors import RequestError
from backends.heads import HEADS
from backends.stages.base import Stage, StageContext
from backends.stages.loaded_head import LoadedHead, Reading
from backends.stages.request import StageRequest
from backends.stages.response import Answer

HEAD = "head"
"""The entry's parameter that names the head."""
READS = "reads"
"""The entry's parameter that names the tensor of hidden states, where that is not `hidden`."""


class HeadStage(Stage):
    """Applies one head; requests with the same parameters share a pass."""

    def setup(self, context: StageContext) -> None:
        name = context.parameters[HEAD]
        is_heavy = HEADS[name].is_heavy
        # Most heads are small: one thread each leaves the cores to the encoder.
        torch.set_num_threads(context.options.threads or len(os.sched_getaffinity(0)) if is_heavy else 1)
        self.device = place(context.device)
        self.hidden_name = context.parameters.get(READS, HIDDEN)
        self.head = LoadedHead(name, context, self.device, reads_one_row=self.hidden_name == LAST_HIDDEN)

    def is_out_of_memory(self, error: Exception) -> bool:
        return device.is_out_of_memory(error)

    def free_memory(self) -> None:
        device.free_memory(self.device)

    def check_device(self) -> None:
        device.check(self.device)

    def run(self, batch: Sequence[StageRequest]) -> list[Answer | RequestError]:
        return self.head([self._read(request) for request in batch])

    def _read(self, request: StageRequest) -> Reading:
        hidden = request.tensor(self.hidden_name)[0].to(self.device)
        if self.hidden_name == LAST_HIDDEN:
            lengths = np.ones(len(hidden), np.int64)
        else:
            lengths = request.array(LENGTH)[0].astype(np.int64)
        inputs = {name: torch.from_numpy(request.array(name)[0]) for name in self.head.inputs}
        return Reading(request.parameters, hidden, lengths, inputs)
