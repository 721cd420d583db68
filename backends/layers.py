"""Layers made of a checkpoint's own tensors, without a copy."""

from __future__ import annotations

import torch

from backends.errors import CheckpointError

_ACTIVATIONS: dict[str, type[torch.nn.Module]] = {
    "gelu": torch.nn.GELU,
    "relu": torch.nn.ReLU,
    "silu": torch.nn.SiLU,
    "tanh": torch.nn.Tanh,
}


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Module:
    """weight [out, in], bias [out] -> the layer."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return _filled(layer, weight, bias)


def norm(weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.nn.Module:
    """weight and bias [h] -> the LayerNorm."""
    layer = torch.nn.LayerNorm(weight.shape[0], eps, bias=bias is not None, device="meta")
    return _filled(layer, weight, bias)


def activation(name: str) -> torch.nn.Module:
    """By its name in config.json. Raises CheckpointError for one that is not known here."""
    if name in ("gelu_new", "gelu_pytorch_tanh"):
        return torch.nn.GELU(approximate="tanh")
    if name not in _ACTIVATIONS:
        raise CheckpointError(
            f"the activation {name!r} of a head is not served; known are {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]()


def _filled(layer: torch.nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Module:
    layer.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias})}, assign=True)
    return layer
