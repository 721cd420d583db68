"""The modules of a sentence-transformers chain, over a ragged batch and in float32.

*Source:* sentence-transformers 6.2, sentence_transformer/modules/pooling.py, base/modules/dense.py,
layer_norm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from backends.checkpoint import Module
from backends.device import has_kernels
from backends.errors import CheckpointError
from backends.ragged import Ragged
from backends.weights import read_tensors
from kernels.transfer import to_device


class Pooling:
    """Makes one vector of each sequence; several modes are concatenated."""

    def __init__(self, modes: Sequence[str]) -> None:
        self.modes = tuple(modes)

    def __call__(self, hidden: Ragged, prompt_length: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [t, h] -> float32 [n, h * modes].

        `prompt_length` [n] leaves that many tokens at the beginning of each sequence out of the pooling;
        lasttoken looks at the last token all the same, and weightedmean keeps the weights of the original
        positions.
        """
        if not hidden.lengths.all():
            raise ValueError("a sequence without tokens has no embedding")
        if has_kernels(hidden.values.device):
            return self._pool_by_kernel(hidden, prompt_length)
        if prompt_length is None:
            return self._pool(hidden, hidden, 0)
        skipped = torch.clamp(prompt_length.to(torch.int64), max=torch.from_numpy(hidden.lengths) - 1)
        kept = (hidden.positions >= skipped.to(hidden.values.device)[hidden.segments]).nonzero()[:, 0]
        rest = Ragged(hidden.values[kept], hidden.lengths - skipped.numpy())
        return self._pool(rest, hidden, skipped.to(hidden.values.device))

    def _pool_by_kernel(self, hidden: Ragged, prompt_length: torch.Tensor | None) -> torch.Tensor:
        # Triton is not imported where there is no use for it.
        from kernels.segment_pooling import pool

        skipped = None if prompt_length is None else prompt_length.tolist()
        parts = [pool(hidden.values, hidden.lengths.tolist(), mode, skipped=skipped) for mode in self.modes]
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    def _pool(self, rest: Ragged, whole: Ragged, skipped: torch.Tensor | int) -> torch.Tensor:
        """`rest` is `whole` without the first `skipped` tokens of each sequence."""
        parts = []
        count = to_device(rest.lengths, rest.values.device).float()[:, None]
        for mode in self.modes:
            if mode == "cls":
                parts.append(rest.values[to_device(rest.offsets[:-1], rest.values.device)].float())
            elif mode == "lasttoken":
                parts.append(whole.values[to_device(whole.offsets[1:] - 1, whole.values.device)].float())
            elif mode == "mean":
                parts.append(_segment_sum(rest, rest.values.float()) / count)
            elif mode == "mean_sqrt_len_tokens":
                parts.append(_segment_sum(rest, rest.values.float()) / count.sqrt())
            elif mode == "weightedmean":
                first = skipped[rest.segments] if isinstance(skipped, torch.Tensor) else skipped
                weights = (rest.positions + first + 1).float()[:, None]
                parts.append(_segment_sum(rest, rest.values.float() * weights) / _segment_sum(rest, weights))
            elif mode == "max":
                parts.append(_segment_max(rest))
            else:
                raise ValueError(f"unknown pooling mode {mode!r}")
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def _segment_sum(batch: Ragged, values: torch.Tensor) -> torch.Tensor:
    """values [t, d] -> [n, d].

    index_add_ is 10 times faster than torch.segment_reduce on a CPU (torch 2.13).
    """
    total = values.new_zeros(len(batch.lengths), values.shape[1])
    return total.index_add_(0, batch.segments, values)


def _segment_max(batch: Ragged) -> torch.Tensor:
    values = batch.values.float()
    lowest = values.new_full((len(batch.lengths), values.shape[1]), float("-inf"))
    return lowest.scatter_reduce_(0, batch.segments[:, None].expand_as(values), values, "amax")


class Dense(torch.nn.Module):
    """activation(W x + b), with an optional residual connection."""

    def __init__(
        self, size_in: int, size_out: int, bias: bool, activation: torch.nn.Module, has_residual: bool
    ) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(size_in, size_out, bias=bias)
        self.activation = activation
        self.has_residual = has_residual
        if has_residual and size_in != size_out:
            self.residual = torch.nn.Linear(size_in, size_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.activation(self.linear(x))
        if self.has_residual:
            out = out + (self.residual(x) if hasattr(self, "residual") else x)
        return out


class LayerNorm(torch.nn.Module):
    """LayerNorm of the sentence vector."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(x)
        return out


class Normalize(torch.nn.Module):
    """Scales to unit length."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(x, dim=-1)


def load_link(module: Module, device: torch.device) -> torch.nn.Module:
    """A module behind the Pooling with its weights, float32 [n, d] -> [n, d']. Raises CheckpointError."""
    if module.kind == "Normalize":
        return Normalize()
    config = module.config
    weights = _read_weights(module.path)
    if module.kind == "LayerNorm":
        link: torch.nn.Module = LayerNorm(int(config["dimension"]))
    else:
        link = Dense(
            int(config["in_features"]),
            int(config["out_features"]),
            bool(config.get("bias", True)),
            _activation(module, config.get("activation_function", "torch.nn.modules.activation.Tanh")),
            bool(config.get("use_residual", False)),
        )
    try:
        link.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {module.path} do not fit its config.json: {error}") from error
    return link.float().to(device).eval().requires_grad_(False)


def _activation(module: Module, dotted_name: str) -> torch.nn.Module:
    name = dotted_name.rsplit(".", 1)[-1]
    found = getattr(torch.nn, name, None)
    if (
        not dotted_name.startswith("torch.nn.")
        or not isinstance(found, type)
        or not issubclass(found, torch.nn.Module)
    ):
        raise CheckpointError(
            f"{module.path}/config.json: activation_function {dotted_name!r} is no module of torch.nn"
        )
    return found()


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return read_tensors(path / name)
    raise CheckpointError(f"{path} has no weights; model.safetensors or pytorch_model.bin belongs there")
