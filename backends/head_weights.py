"""The tensors of a head that an encoder's checkpoint holds beside the encoder, and the steps made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from backends import layers
from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError
from backends.weights import read_tensors


class HeadWeights:
    """What there is of some names, in one format on one device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        what: str,
        names: Iterable[str],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.folder = checkpoint.transformer_path
        self.config = checkpoint.config
        self.what = what
        self.found = {n: value.to(device, dtype) for n, value in read_tensors(self.folder, names).items()}

    def take(self, name: str) -> torch.Tensor:
        """Raises CheckpointError for a tensor that is missing."""
        if name not in self.found:
            raise CheckpointError(f"{self.folder} lacks {name}, a weight of its {self.what}")
        return self.found[name]

    def linear(self, name: str) -> torch.nn.Module:
        """The layer of that name, with a bias where there is one. Raises CheckpointError."""
        return layers.linear(self.take(f"{name}.weight"), self.found.get(f"{name}.bias"))

    def transform(
        self, dense: str | None, activation: str, norm: str | None, eps: str, default_eps: float
    ) -> list[torch.nn.Module]:
        """dense, activation, norm, as far as the head has them; `activation` and `eps` as in setting().

        Raises CheckpointError.
        """
        steps: list[torch.nn.Module] = []
        if dense is not None:
            steps += [self.linear(dense), layers.activation(str(setting(self.config, activation, "gelu")))]
        if norm is not None:
            weight, bias = self.take(f"{norm}.weight"), self.found.get(f"{norm}.bias")
            steps.append(layers.norm(weight, bias, float(setting(self.config, eps, default_eps))))
        return steps


def setting(config: Mapping[str, Any], name: str, default: Any) -> Any:
    """An entry of config.json, or what follows a leading "="."""
    return name[1:] if name.startswith("=") else config.get(name, default)
