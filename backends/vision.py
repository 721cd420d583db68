"""What the encoder sees of a batch besides its texts: the patches of images, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from backends.grouping import neighbours
from backends.ragged import Lengths
from kernels.transfer import to_device

Grids = npt.NDArray[np.int64]
"""[m, 3]: patches of each image along time, height and width."""


@dataclass(frozen=True)
class Images:
    """The images of a batch, in the order of their items."""

    patches: torch.Tensor
    """uint8 [p, c], on the host."""
    grids: Grids

    @property
    def counts(self) -> Lengths:
        """[m]: patches of each image."""
        counts: Lengths = self.grids.prod(axis=1)
        return counts


class Sees(Protocol):
    """A loaded model that looks at images."""

    def see(self, patches: torch.Tensor, grids: Grids) -> torch.Tensor:
        """uint8 [p, c] and [m, 3] -> states [r, ...] of the images end to end, in the model's dtype."""


class PixelTable(torch.nn.Module):
    """Bytes of patches -> the numbers that the model was trained with."""

    def __init__(self, table: npt.NDArray[np.float32], device: torch.device) -> None:
        super().__init__()
        self.table = torch.from_numpy(table).to(device)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """uint8 [p, 3 * s] -> float32 [p, 3, s]."""
        values = to_device(patches, self.table.device).view(len(patches), 3, -1).long()
        return torch.gather(self.table[None].expand(len(values), -1, -1), 2, values)


def see(model: Sees, images: Images, max_patches: int) -> torch.Tensor:
    """States [r, ...] of all images, in passes of at most `max_patches` patches or of one image."""
    counts = images.counts
    ends = np.cumsum(counts)
    # Their order stays: states are used in it.
    parts = [
        model.see(
            images.patches[ends[part.start] - counts[part.start] : ends[part.stop - 1]],
            images.grids[part.start : part.stop],
        )
        for part in neighbours(counts.tolist(), max_patches)
    ]
    return torch.cat(parts) if len(parts) != 1 else parts[0]


@dataclass(frozen=True)
class Seen:
    """What stands for the images among the tokens of a batch."""

    states: torch.Tensor
    """[r, ...] on the device, one of each image token in order."""
    slots: Lengths
    """[t]: which of the states stands for a token; -1 for words."""
    positions: Lengths | None
    """[3, t]; None where images take positions as words do."""

    def of(self, row: Lengths) -> SeenRow:
        """The part of it that the tokens `row` [u] of the batch need, which make a packed row."""
        slots = self.slots[row]
        places = np.flatnonzero(slots >= 0)
        device = self.states.device
        states = self.states[to_device(slots[places], device)]
        positions = None
        if self.positions is not None:
            positions = to_device(np.ascontiguousarray(self.positions[:, row]), device)
        return SeenRow(states, to_device(places, device), positions)


@dataclass(frozen=True)
class SeenRow:
    """The same for one packed row."""

    states: torch.Tensor
    """[r, ...]"""
    places: torch.Tensor
    """int64 [r]: where in the row they stand."""
    positions: torch.Tensor | None
    """int64 [3, u]"""
