"""A packed batch: the values of all sequences end to end, and where each begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from kernels.transfer import to_device

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """values [t, ...] on any device; lengths [n] on the host, so that no forward pass waits for the
    device.
    """

    values: torch.Tensor
    lengths: Lengths

    def __post_init__(self) -> None:
        if int(self.lengths.sum()) != self.values.shape[0]:
            raise ValueError(
                f"lengths add up to {int(self.lengths.sum())}, but there are {self.values.shape[0]} values"
            )

    @classmethod
    def pack(cls, sequences: Sequence[torch.Tensor]) -> Ragged:
        """Sequences [s_i, ...] put end to end."""
        lengths = np.fromiter((s.shape[0] for s in sequences), np.int64, len(sequences))
        return cls(torch.cat(list(sequences)), lengths)

    @cached_property
    def offsets(self) -> Lengths:
        """[n + 1]: sequence i is values[offsets[i] : offsets[i + 1]]."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])

    @property
    def max_length(self) -> int:
        return int(self.lengths.max(initial=0))

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """int32 [n + 1] on the device of the values: the form that attention kernels take."""
        return to_device(self.offsets.astype(np.int32), self.values.device)

    @cached_property
    def segments(self) -> torch.Tensor:
        """int64 [t]: which sequence each value belongs to."""
        return to_device(np.repeat(np.arange(len(self.lengths)), self.lengths), self.values.device)

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 [t]: 0, 1, 2 ... within each sequence."""
        return to_device(positions(self.lengths), self.values.device)

    def split(self) -> list[torch.Tensor]:
        """The sequences [s_i, ...] as views."""
        return list(torch.split(self.values, self.lengths.tolist()))


def positions(lengths: Lengths) -> Lengths:
    """[t]: 0, 1, 2 ... within each sequence."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(starts, lengths)


def cut_by_budget(
    lengths: Lengths, max_tokens: int, *, ties: Lengths | None = None, is_padded: bool = False
) -> Iterator[npt.NDArray[np.intp]]:
    """Indices of the sequences of each forward pass, longest first, none over `max_tokens` tokens in all.

    A sequence that is longer than the budget gets a pass of its own. Longest first, because equal lengths
    then lie side by side, and because memory runs out on the first pass or never. `ties` orders sequences of
    one length; `is_padded` counts every sequence of a pass as long as its longest.
    """
    order = np.argsort(-lengths, kind="stable") if ties is None else np.lexsort((-ties, -lengths))
    start = 0
    total = 0
    for end, index in enumerate(order):
        size = int(lengths[order[start]] if is_padded else lengths[index])
        if end > start and total + size > max_tokens:
            yield order[start:end]
            start, total, size = end, 0, int(lengths[index])
        total += size
    if start < len(order):
        yield order[start:]
