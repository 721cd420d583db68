"""What a finding pass asks of a device, and how several layers share one product: the same everywhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class StandIns(Protocol):
    """The modules of one kind of device. Each may say None: then a module stays as it is."""

    def product(self, layers: Sequence[torch.nn.Linear]) -> torch.nn.Module | None:
        """One module for layers over the same input, whose outputs lie side by side."""

    def activated(self, dense: torch.nn.Linear, activation: torch.nn.Module) -> torch.nn.Module | None:
        """activation(dense(x))."""

    def residual(self, dense: torch.nn.Linear, norm: torch.nn.LayerNorm) -> torch.nn.Module | None:
        """norm(dense(x) + y)."""

    def gated(
        self, gate: torch.nn.Linear, up: torch.nn.Linear, down: torch.nn.Linear, activation: torch.nn.Module
    ) -> torch.nn.Module | None:
        """down(activation(gate(x)) * up(x))."""

    def gated_halves(
        self, both: torch.nn.Linear, down: torch.nn.Linear, activation: torch.nn.Module
    ) -> torch.nn.Module | None:
        """The same where one layer makes the gate and what is gated, side by side."""

    def leaf(self, module: torch.nn.Module) -> torch.nn.Module | None:
        """A module without parts: a norm, an activation, a product that nothing was made of."""

    def adapt(self, module: torch.nn.Module) -> bool:
        """Whether it has made a module compute in another way, which stays where it is."""


class Joint(threading.local):
    """One product for several layers over the same input; each layer takes its part of it.

    What it remembers belongs to one thread: the model runs in several at once.
    """

    input: torch.Tensor | None = None
    parts: Sequence[torch.Tensor] = ()

    def __init__(self, layer: Callable[[torch.Tensor], torch.Tensor], sizes: Sequence[int]) -> None:
        self.layer = layer
        self.sizes = list(sizes)

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Computes all parts at the first call for an input, and forgets them after the last."""
        if x is not self.input:
            self.parts = torch.split(self.layer(x), self.sizes, dim=-1)
            self.input = x
        part = self.parts[index]
        if index == len(self.sizes) - 1:
            self.input, self.parts = None, ()
        return part


class Part(torch.nn.Module):
    """One of the layers that share a product."""

    def __init__(self, joint: Joint, index: int) -> None:
        super().__init__()
        self.joint = joint
        self.index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.joint.part(self.index, x)


def are_alike(layers: Sequence[torch.nn.Linear]) -> bool:
    """Whether layers can be one: over one input, all with a bias or none."""
    return len({(layer.in_features, layer.bias is None, layer.weight.dtype) for layer in layers}) == 1
