"""What stands in on a GPU: products of torch, and one kernel for all that lies between two of them.

Modules take [..., h]; kernels take rows, so that a padded batch, a packed row and the heads of a token are
all the same to them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from backends.fusion.parts import are_alike
from backends.fusion.rotary import turn_with_kernel
from kernels.gated_activation import ACTIVATIONS, activate_reference, bias_activation, gated_activation
from kernels.residual_norm import layer_norm, rms_norm, rms_norm_reference

# Names under which RMSNorm modules keep what is added to the mean square.
_EPS_NAMES = ("variance_epsilon", "eps")
# Activations that torch computes in one pass as well, and launches faster.
_ONE_OPERATION = ("GELUActivation", "GELUTanh", "SiLUActivation", "GELU", "SiLU", "ReLU")
_TORCH_ACTIVATIONS = (torch.nn.GELU, torch.nn.SiLU, torch.nn.ReLU)


class JointLinear(torch.nn.Module):
    """Linear layers over one input as one; their outputs lie side by side."""

    def __init__(self, layers: Sequence[torch.nn.Linear]) -> None:
        super().__init__()
        self.weight = _joined([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self.bias = _joined(biases) if biases else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Activated(torch.nn.Module):
    """A product, and its bias and activation in one pass."""

    def __init__(self, dense: torch.nn.Linear, activation: str) -> None:
        super().__init__()
        self.weight, self.bias = dense.weight, dense.bias
        self.activation = activation

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        y = F.linear(hidden_states, self.weight)
        return bias_activation(_rows(y), self.bias, activation=self.activation).view(y.shape)


class Residual(torch.nn.Module):
    """A product, then the residual and LayerNorm in one pass."""

    def __init__(self, dense: torch.nn.Linear, norm: torch.nn.LayerNorm) -> None:
        super().__init__()
        self.dense = dense
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        y = self.dense(hidden_states)
        normed = layer_norm(_rows(y), self.weight, self.bias, self.eps, _rows(input_tensor))
        return normed.view(y.shape)


class Gated(torch.nn.Module):
    """One product for gate and up, activation and multiplication in one pass, down."""

    def __init__(self, gate_up: torch.nn.Module, down: torch.nn.Linear, activation: str) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.activation = activation

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        y = gated_activation(_rows(self.gate_up(hidden_states)), activation=self.activation)
        return self.down(y.view(*hidden_states.shape[:-1], -1))  # type: ignore[no-any-return]


class Activation(torch.nn.Module):
    """An activation that stands alone, which some models put together of many operations."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return bias_activation(_rows(x), activation=self.activation).view(x.shape)


class LayerNorm(torch.nn.Module):
    """LayerNorm of what has no residual."""

    def __init__(self, norm: torch.nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(_rows(x), self.weight, self.bias, self.eps).view(x.shape)


class RMSNorm(torch.nn.Module):
    """Llama's, or Gemma's that adds one to its weights."""

    def __init__(self, weight: torch.nn.Parameter, eps: float, *, adds_one: bool) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.adds_one = adds_one

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states
        return rms_norm(_rows(x), self.weight, self.eps, adds_one=self.adds_one).view(x.shape)


class KernelParts:
    """Implements StandIns."""

    def product(self, layers: Sequence[torch.nn.Linear]) -> JointLinear:
        return JointLinear(layers)

    def activated(self, dense: torch.nn.Linear, activation: torch.nn.Module) -> Activated | None:
        name = _activation_name(activation)
        return None if name is None else Activated(dense, name)

    def residual(self, dense: torch.nn.Linear, norm: torch.nn.LayerNorm) -> Residual | None:
        return Residual(dense, norm) if _is_plain(norm) and norm.weight.dtype == dense.weight.dtype else None

    def gated(
        self, gate: torch.nn.Linear, up: torch.nn.Linear, down: torch.nn.Linear, activation: torch.nn.Module
    ) -> Gated | None:
        name = _activation_name(activation)
        if name is None or not are_alike([gate, up]) or gate.out_features != up.out_features:
            return None
        return Gated(JointLinear([gate, up]), down, name)

    def gated_halves(
        self, both: torch.nn.Linear, down: torch.nn.Linear, activation: torch.nn.Module
    ) -> Gated | None:
        name = _activation_name(activation)
        return None if name is None else Gated(both, down, name)

    def leaf(self, module: torch.nn.Module) -> torch.nn.Module | None:
        if type(module) is torch.nn.LayerNorm:
            return LayerNorm(module) if _is_plain(module) else None
        if type(module).__name__.endswith("RMSNorm"):
            return _rms_norm(module)
        name = None if type(module).__name__ in _ONE_OPERATION else _activation_name(module)
        return None if name is None else Activation(name)

    def adapt(self, module: torch.nn.Module) -> bool:
        return turn_with_kernel(module)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., h] -> [t, h]; a copy only where rows cannot be told of by one stride."""
    return x.reshape(-1, x.shape[-1])


def _joined(tensors: Sequence[torch.Tensor]) -> torch.nn.Parameter:
    """End to end. The tensors become views of it, so that a large model is never in memory twice."""
    joint = torch.cat([tensor.data for tensor in tensors])
    for tensor, part in zip(tensors, joint.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.data = part
    return torch.nn.Parameter(joint, requires_grad=False)


def _is_plain(norm: torch.nn.LayerNorm) -> bool:
    return len(norm.normalized_shape) == 1 and norm.weight is not None


def _activation_name(module: torch.nn.Module) -> str | None:
    """The kernel's name of an activation, by what it computes."""
    kind = type(module)
    # Others, such as a dropout, are not asked what they compute.
    if kind.__module__ != "transformers.activations" and kind not in _TORCH_ACTIVATIONS:
        return None
    if next(module.parameters(), None) is not None:
        return None
    x = torch.linspace(-6, 6, 97)
    y = module(x)
    return next((n for n in ACTIVATIONS if torch.allclose(y, activate_reference(x, n), atol=1e-6)), None)


def _rms_norm(module: torch.nn.Module) -> RMSNorm | None:
    """None for a norm that computes something else than its name says."""
    weight = getattr(module, "weight", None)
    eps = next((getattr(module, name) for name in _EPS_NAMES if hasattr(module, name)), None)
    has_more = len(list(module.parameters())) != 1
    if not isinstance(weight, torch.nn.Parameter) or weight.ndim != 1 or has_more or eps is None:
        return None
    # Where a weight is large, what one more changes is less than what half precision rounds.
    exact = copy.deepcopy(module).to("cpu", torch.float32)
    x = torch.linspace(-2, 3, 3 * len(weight)).view(3, -1)
    with torch.inference_mode():
        y = exact(x)
        for adds_one in (False, True):
            expected, _ = rms_norm_reference(x, None, exact.weight, float(eps), adds_one=adds_one)  # type: ignore[arg-type]
            if torch.allclose(y, expected, atol=1e-5, rtol=1e-5):
                return RMSNorm(weight, float(eps), adds_one=adds_one)
    return None
