"""What stands in on a CPU: every weight is laid out once for the matrix library, and what follows a product
is computed with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from kernels.blockwise_gelu import BlockwiseGelu
from kernels.half_linear import HalfLinear, can_halve
from kernels.int8_linear import Int8Linear, can_quantize
from kernels.packed_linear import PackedLinear, has_fast_gelu

Product = PackedLinear | Int8Linear | HalfLinear
_Make = Callable[[list[torch.nn.Linear]], Product]
QUANTIZED: dict[str, tuple[Callable[[torch.Tensor], bool], _Make]] = {
    "float16": (can_halve, HalfLinear),
    "int8": (can_quantize, Int8Linear),
}
"""Quantization -> whether a weight can be quantized so here, and the product that does it."""

# Classes of torch and of transformers.
_GELUS = ("GELU", "GELUActivation")
# Weights of a model up to which the plain ones are kept beside the packed ones.
_MOST_KEPT_BYTES = 2**30


class Activated(torch.nn.Module):
    """BERT's intermediate layer: a product and its activation."""

    def __init__(self, dense: Product) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense(hidden_states, activation="gelu")  # type: ignore[no-any-return]


class Residual(torch.nn.Module):
    """BERT's output layers: a product, the residual, LayerNorm."""

    def __init__(self, dense: Product, norm: torch.nn.LayerNorm) -> None:
        super().__init__()
        self.dense = dense
        self.LayerNorm = norm

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dense(hidden_states, residual=input_tensor))  # type: ignore[no-any-return]


class Gated(torch.nn.Module):
    """act(gate) * up, then down: the activation in place."""

    def __init__(self, gate_up: Product, activation: torch.nn.Module, down: torch.nn.Module) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.activation = activation
        self.down = down

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(hidden_state).chunk(2, dim=-1)
        return self.down(self.activation(gate).mul_(up))  # type: ignore[no-any-return]


class PackedParts:
    """Implements StandIns."""

    def __init__(self, model: torch.nn.Module, quantization: str = "none") -> None:
        linears = [m for m in model.modules() if type(m) is torch.nn.Linear]
        self.keeps_plain = sum(m.weight.nbytes for m in linears) <= _MOST_KEPT_BYTES
        plain = partial(PackedLinear, keeps_plain=self.keeps_plain)
        self.make: _Make = plain if quantization == "none" else QUANTIZED[quantization][1]
        self.packed: dict[torch.nn.Linear, Product] = {}

    def product(self, layers: Sequence[torch.nn.Linear]) -> Product:
        first = layers[0]
        if len(layers) == 1 and first in self.packed:
            return self.packed[first]
        packed = self.make(list(layers))
        if len(layers) == 1:
            self.packed[first] = packed
        return packed

    def activated(self, dense: torch.nn.Linear, activation: torch.nn.Module) -> Activated | None:
        is_fast = _is_gelu(activation) and has_fast_gelu()
        return Activated(self.product([dense])) if is_fast else None

    def residual(self, dense: torch.nn.Linear, norm: torch.nn.LayerNorm) -> Residual:
        return Residual(self.product([dense]), norm)

    def gated(
        self, gate: torch.nn.Linear, up: torch.nn.Linear, down: torch.nn.Linear, activation: torch.nn.Module
    ) -> Gated:
        return Gated(self.product([gate, up]), activation, self.product([down]))

    def gated_halves(self, both: torch.nn.Linear, down: torch.nn.Linear, activation: torch.nn.Module) -> None:
        """Its two products are packed one by one."""

    def leaf(self, module: torch.nn.Module) -> torch.nn.Module | None:
        if type(module).__name__ in _GELUS and _is_gelu(module):
            return BlockwiseGelu()
        return self.product([module]) if type(module) is torch.nn.Linear else None

    def adapt(self, module: torch.nn.Module) -> bool:
        return False


def compiles_long_rows(model: torch.nn.Module) -> bool:
    """Whether oneDNN multiplies rows of any length for it, and compiles each length."""
    return any(one.compiles_long_rows for one in model.modules() if isinstance(one, Product))


def _is_gelu(activation: torch.nn.Module) -> bool:
    """The exact one, by what it computes."""
    x = torch.linspace(-4, 4, 33)
    return bool(torch.allclose(activation(x), F.gelu(x), atol=1e-6))
