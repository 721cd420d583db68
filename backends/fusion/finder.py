"""Finds what can be computed together in a loaded model, and puts there what its device has for that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from backends.device import has_kernels
from backends.fusion import layer
from backends.fusion.on_cpu import QUANTIZED, PackedParts
from backends.fusion.parts import Joint, Part, StandIns, are_alike
from kernels.packed_linear import can_pack

# Layers over the same input, in the order in which they are called.
_SIBLINGS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
)


def fuse(model: torch.nn.Module, quantization: str = "none") -> int:
    """Replaces modules of a model, in place. How many; 0 leaves it as it was.

    Raises ValueError for weights that cannot be kept as `quantization` says.
    """
    stand_ins = _stand_ins(model, quantization)
    return 0 if stand_ins is None else _Pass(model, stand_ins).run()


def _stand_ins(model: torch.nn.Module, quantization: str) -> StandIns | None:
    """What the model's device and number format have; None for a model that stays as it is."""
    parameters = list(model.parameters())
    formats = {p.dtype: p for p in parameters}.values()
    if quantization != "none":
        can, _ = QUANTIZED[quantization]
        return PackedParts(model, quantization) if all(map(can, formats)) else None
    if has_kernels(parameters[0].device):
        # Triton is not imported where there is no use for it.
        from backends.fusion.on_gpu import KernelParts

        return KernelParts()
    return PackedParts(model) if all(map(can_pack, formats)) else None


class _Pass:
    def __init__(self, model: torch.nn.Module, stand_ins: StandIns) -> None:
        self.model = model
        self.stand_ins = stand_ins
        self.count = 0

    def run(self) -> int:
        self._replace(self._block)
        for parent in list(self.model.modules()):
            for names in _SIBLINGS:
                self._join(parent, names)
        self._replace(lambda child: None if dict(child.named_children()) else self.stand_ins.leaf(child))
        self.count += sum(map(self.stand_ins.adapt, self.model.modules()))
        self._replace(layer.stand_in)
        return self.count

    def _replace(self, stand_in: Any) -> None:
        """Every module once, also where several parents share it."""
        made: dict[torch.nn.Module, torch.nn.Module | None] = {}
        for parent in list(self.model.modules()):
            for name, child in list(parent.named_children()):
                if child not in made:
                    made[child] = stand_in(child)
                    self.count += made[child] is not None
                found = made[child]
                if found is not None:
                    setattr(parent, name, found)

    def _block(self, module: torch.nn.Module) -> torch.nn.Module | None:
        """What stands in for a module that consists of exactly these parts."""
        parts: dict[str, Any] = dict(module.named_children())
        linears = {name for name, part in parts.items() if type(part) is torch.nn.Linear}
        match sorted(set(parts) - {"dropout", "drop"}):
            case ["LayerNorm", "dense"] if "dropout" in parts and "dense" in linears:
                if type(parts["LayerNorm"]) is torch.nn.LayerNorm:
                    return self.stand_ins.residual(parts["dense"], parts["LayerNorm"])
            case ["dense", "intermediate_act_fn"] if "dense" in linears and "dropout" not in parts:
                return self.stand_ins.activated(parts["dense"], parts["intermediate_act_fn"])
            case ["act_fn", "down_proj", "gate_proj", "up_proj"] if len(linears) == 3:
                gate, up, down = (parts[name] for name in ("gate_proj", "up_proj", "down_proj"))
                return (
                    self.stand_ins.gated(gate, up, down, parts["act_fn"]) if are_alike([gate, up]) else None
                )
            case ["Wi", "Wo", "act"] if len(linears) == 2:
                both, down = parts["Wi"], parts["Wo"]
                if both.out_features == 2 * down.in_features:
                    return self.stand_ins.gated_halves(both, down, parts["act"])
        return None

    def _join(self, parent: torch.nn.Module, names: Sequence[str]) -> None:
        layers: list[Any] = [getattr(parent, name, None) for name in names]
        if all(type(layer) is torch.nn.Linear for layer in layers) and are_alike(layers):
            product = self.stand_ins.product(layers)
            if product is not None:
                self.count += 1
                joint = Joint(product, [layer.out_features for layer in layers])
                for index, name in enumerate(names):
                    setattr(parent, name, Part(joint, index))
