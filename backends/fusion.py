"""Makes a loaded model faster without knowing its family: its layers are found by how they are put together.

Projections of one input (query, key and value; gate and up) become one product. On a CPU every weight is laid
out once for the matrix library, and what follows a product is computed with it. The self-check compares the
result with the model as it was: a family that does otherwise than its layers' names say stays as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kernels.int8_linear import Int8Linear, can_quantize
from kernels.packed_linear import PackedLinear, can_pack, has_fast_gelu

Product = PackedLinear | Int8Linear

# Layers over the same input, in the order in which they are called.
_SIBLINGS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
)
# Weights of a model up to which the plain ones are kept beside the packed ones.
_MOST_KEPT_BYTES = 2**30


class _Joint(threading.local):
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


class _Part(torch.nn.Module):
    def __init__(self, joint: _Joint, index: int) -> None:
        super().__init__()
        self.joint = joint
        self.index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.joint.part(self.index, x)


class _Activated(torch.nn.Module):
    """BERT's intermediate layer: a product and its activation."""

    def __init__(self, dense: Product) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense(hidden_states, activation="gelu")  # type: ignore[no-any-return]


class _Residual(torch.nn.Module):
    """BERT's output layers: a product, the residual, LayerNorm."""

    def __init__(self, dense: Product, norm: torch.nn.LayerNorm) -> None:
        super().__init__()
        self.dense = dense
        self.LayerNorm = norm

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dense(hidden_states, residual=input_tensor))  # type: ignore[no-any-return]


class _Gated(torch.nn.Module):
    """act(gate) * up, then down: the activation in place."""

    def __init__(self, gate_up: Product, activation: torch.nn.Module, down: torch.nn.Module) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.activation = activation
        self.down = down

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(hidden_state).chunk(2, dim=-1)
        return self.down(self.activation(gate).mul_(up))  # type: ignore[no-any-return]


def fuse(model: torch.nn.Module, *, in_int8: bool = False) -> int:
    """Replaces modules of a model, in place. How many products it has packed; 0 leaves it as it was."""
    can = can_quantize if in_int8 else can_pack
    if not all(map(can, {p.dtype: p for p in model.parameters()}.values())):
        return 0
    return _Pass(model, in_int8=in_int8).run()


class _Pass:
    def __init__(self, model: torch.nn.Module, *, in_int8: bool) -> None:
        self.model = model
        self.in_int8 = in_int8
        linears = [m for m in model.modules() if type(m) is torch.nn.Linear]
        self.keeps_plain = sum(m.weight.nbytes for m in linears) <= _MOST_KEPT_BYTES
        self.packed: dict[torch.nn.Linear, Product] = {}
        self.count = 0

    def run(self) -> int:
        for parent in list(self.model.modules()):
            for name, child in list(parent.named_children()):
                block = self._block(child)
                if block is not None:
                    setattr(parent, name, block)
        for parent in list(self.model.modules()):
            for names in _SIBLINGS:
                self._join(parent, names)
        for parent in list(self.model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is torch.nn.Linear:
                    setattr(parent, name, self._pack([child]))
        return self.count

    def _block(self, module: torch.nn.Module) -> torch.nn.Module | None:
        """What stands in for a module that consists of exactly these parts."""
        parts = dict(module.named_children())
        dense = parts.get("dense")
        if type(dense) is torch.nn.Linear:
            if (
                set(parts) == {"dense", "LayerNorm", "dropout"}
                and type(parts["LayerNorm"]) is torch.nn.LayerNorm
            ):
                return _Residual(self._pack([dense]), parts["LayerNorm"])
            if set(parts) == {"dense", "intermediate_act_fn"}:
                is_gelu = _is_gelu(parts["intermediate_act_fn"])
                return _Activated(self._pack([dense])) if is_gelu and has_fast_gelu() else None
        if set(parts) - {"dropout"} == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            gate, up, down = (parts[name] for name in ("gate_proj", "up_proj", "down_proj"))
            if all(type(layer) is torch.nn.Linear for layer in (gate, up, down)) and _alike([gate, up]):
                return _Gated(self._pack([gate, up]), parts["act_fn"], self._pack([down]))
        return None

    def _join(self, parent: torch.nn.Module, names: Sequence[str]) -> None:
        layers: list[Any] = [getattr(parent, name, None) for name in names]
        if all(type(layer) is torch.nn.Linear for layer in layers) and _alike(layers):
            joint = _Joint(self._pack(layers), [layer.out_features for layer in layers])
            for index, name in enumerate(names):
                setattr(parent, name, _Part(joint, index))

    def _pack(self, layers: list[Any]) -> Product:
        if len(layers) == 1 and layers[0] in self.packed:
            return self.packed[layers[0]]
        self.count += 1
        packed = Int8Linear(layers) if self.in_int8 else PackedLinear(layers, keeps_plain=self.keeps_plain)
        if len(layers) == 1:
            self.packed[layers[0]] = packed
        return packed


def _alike(layers: Sequence[Any]) -> bool:
    """Whether layers can be one: over one input, all with a bias or none."""
    return len({(layer.in_features, layer.bias is None, layer.weight.dtype) for layer in layers}) == 1


def _is_gelu(activation: torch.nn.Module) -> bool:
    """The exact one, by what it computes."""
    x = torch.linspace(-4, 4, 33)
    return bool(torch.allclose(activation(x), F.gelu(x), atol=1e-6))
