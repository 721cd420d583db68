"""A head with its weights: requests with the same parameters share a pass, wherever the head runs.

The head stage has one, the encoder has all of its pipeline's where they are fused into it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from backends.contract import COUNT_OF
from backends.device import TORCH_DTYPES, compute_dtype, has_kernels
from backends.errors import RequestError
from backends.heads import HEADS
from backends.options import WIRE_DTYPES
from backends.ragged import Lengths, Ragged
from backends.stages.base import StageContext
from backends.stages.response import Answer
from backends.trust import check_trust


@dataclass(frozen=True)
class Reading:
    """What a head reads of one request."""

    parameters: Mapping[str, Any]
    hidden: torch.Tensor
    """[t, h], or [n, h] where one token of each text is read."""
    lengths: Lengths
    """[n]: how many rows of `hidden` are each text's."""
    inputs: Mapping[str, torch.Tensor]
    """One value [n] for each text or one [t] for each token, by LoadedHead.inputs and maybe more."""


class LoadedHead:
    """Raises CheckpointError where the checkpoint's own code must not run."""

    def __init__(
        self, name: str, context: StageContext, device: torch.device, *, reads_one_row: bool
    ) -> None:
        spec = HEADS[name]
        check_trust(context.checkpoint, name, context.options)
        self.inputs = () if reads_one_row else spec.inputs(context.checkpoint)
        self.outputs = frozenset(output.name for output in spec.outputs(context.checkpoint))
        self._parameters = spec.parameters
        self._head = spec.load(context.checkpoint, device, compute_dtype(context.options.dtype, device))
        if has_kernels(device):
            wire = TORCH_DTYPES[WIRE_DTYPES[context.options.dtype]]
            self._warm_up(torch.ones(2, context.checkpoint.hidden_size, dtype=wire, device=device))

    def _warm_up(self, hidden: torch.Tensor) -> None:
        """Compiles the head's kernels, so that no request pays for it."""
        # Of two texts with a token each there are two of everything: what an input counts need not be known.
        inputs = {name: torch.ones(2, dtype=torch.int32) for name in self.inputs}
        with torch.inference_mode():
            self._head(Ragged(hidden, np.ones(2, np.int64)), inputs, {})

    def check(self, parameters: Mapping[str, Any]) -> None:
        """Raises RequestError for request parameters that cannot be met."""
        self._head.check(self._own(parameters))

    def __call__(self, batch: Sequence[Reading]) -> list[Answer | RequestError]:
        """The outputs of each request, or why it is refused, in order."""
        answers: list[Answer | RequestError | None] = [None] * len(batch)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(batch):
            try:
                self.check(request.parameters)
                groups.setdefault(json.dumps(self._own(request.parameters)), []).append(i)
            except RequestError as error:
                answers[i] = error
        for members in groups.values():
            for i, answer in zip(members, self._apply([batch[i] for i in members]), strict=True):
                answers[i] = answer
        return [answer for answer in answers if answer is not None]

    def _own(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return {name: parameters[name] for name in self._parameters if name in parameters}

    def _apply(self, batch: Sequence[Reading]) -> Sequence[Answer | RequestError]:
        """Of requests with the same parameters."""
        parts = [request.hidden for request in batch]
        lengths = np.concatenate([request.lengths for request in batch])
        hidden = Ragged(torch.cat(parts) if len(parts) > 1 else parts[0], lengths)
        inputs = {name: torch.cat([request.inputs[name] for request in batch]) for name in self.inputs}
        try:
            with torch.inference_mode():
                outputs = self._head(hidden, inputs, self._own(batch[0].parameters))
        except RequestError as error:
            # Of their parameters, in which they agree.
            return [error] * len(batch)
        counts = [len(request.lengths) for request in batch]
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
