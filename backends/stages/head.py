"""The head stage: hidden [1, t, h], length [1, n] -> the outputs of one head, a row for each text.

Or last_hidden [1, n, h], one token of each text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from backends.contract import COUNT_OF, HIDDEN, LAST_HIDDEN, LENGTH
from backends.device import TORCH_DTYPES, compute_dtype, has_kernels, place
from backends.errors import RequestError
from backends.heads import HEADS
from backends.options import WIRE_DTYPES
from backends.ragged import Ragged
from backends.stages.base import Answer, Stage, StageContext, StageRequest
from backends.trust import check_trust

HEAD = "head"
"""The entry's parameter that names the head."""
READS = "reads"
"""The entry's parameter that names the tensor of hidden states, where that is not `hidden`."""


class HeadStage(Stage):
    """Applies one head; requests with the same parameters share a pass."""

    def setup(self, context: StageContext) -> None:
        spec = HEADS[context.parameters[HEAD]]
        options = context.options
        # Most heads are small: one thread each leaves the cores to the encoder.
        torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)) if spec.is_heavy else 1)
        self.device = place(context.device)
        self.hidden_name = context.parameters.get(READS, HIDDEN)
        self.extra_inputs = spec.inputs(context.checkpoint) if self.hidden_name == HIDDEN else ()
        self.parameter_names = spec.parameters
        assert spec.load is not None
        check_trust(context.checkpoint, context.parameters[HEAD], options)
        self.head = spec.load(context.checkpoint, self.device, compute_dtype(options.dtype, self.device))
        if has_kernels(self.device):
            self._warm_up(context.checkpoint.hidden_size, TORCH_DTYPES[WIRE_DTYPES[options.dtype]])

    def _warm_up(self, size: int, dtype: torch.dtype) -> None:
        """Compiles the head's kernels, so that no request pays for it."""
        # Of two texts with a token each there are two of everything: what an input counts need not be known.
        hidden = Ragged(torch.ones(2, size, dtype=dtype, device=self.device), np.ones(2, np.int64))
        extra = {name: torch.ones(2, dtype=torch.int32) for name in self.extra_inputs}
        with torch.inference_mode():
            self.head(hidden, extra, {})

    def run(self, batch: Sequence[StageRequest]) -> list[Answer | RequestError]:
        answers: list[Answer | RequestError | None] = [None] * len(batch)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(batch):
            parameters = self._parameters(request)
            try:
                self.head.check(parameters)
                groups.setdefault(json.dumps(parameters), []).append(i)
            except RequestError as error:
                answers[i] = error
        for members in groups.values():
            for i, answer in zip(members, self._apply([batch[i] for i in members]), strict=True):
                answers[i] = answer
        return [answer for answer in answers if answer is not None]

    def _parameters(self, request: StageRequest) -> dict[str, Any]:
        return {name: request.parameters[name] for name in self.parameter_names if name in request.parameters}

    def _apply(self, batch: Sequence[StageRequest]) -> list[Answer]:
        parts = [request.tensor(self.hidden_name)[0].to(self.device) for request in batch]
        if self.hidden_name == LAST_HIDDEN:
            lengths = [np.ones(len(part), np.int64) for part in parts]
        else:
            lengths = [request.array(LENGTH)[0].astype(np.int64) for request in batch]
        hidden = Ragged(torch.cat(parts) if len(parts) > 1 else parts[0], np.concatenate(lengths))
        extra = {
            name: torch.from_numpy(np.concatenate([request.array(name)[0] for request in batch]))
            for name in self.extra_inputs
        }
        with torch.inference_mode():
            outputs = self.head(hidden, extra, self._parameters(batch[0]))
        counts = [len(one) for one in lengths]
        split: dict[str, Sequence[Any]] = {}
        for name, value in outputs.items():
            if isinstance(value, Ragged):
                split[name], split[COUNT_OF[name]] = _split_ragged(value, counts)
            else:
                split[name] = torch.split(value, counts)
        return [{name: rows[i] for name, rows in split.items()} for i in range(len(batch))]


def _split_ragged(value: Ragged, counts: Sequence[int]) -> tuple[list[torch.Tensor], list[Any]]:
    """([1, values of a request, ...], [n, 1] how many are each text's) of every request, of `counts`
    texts each.
    """
    lengths = np.split(value.lengths, np.cumsum(counts)[:-1])
    rows = torch.split(value.values, [int(one.sum()) for one in lengths])
    return [row[None] for row in rows], [one.astype(np.int32)[:, None] for one in lengths]
