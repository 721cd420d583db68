"""The middle of a feed-forward: act(gate) * up, and act(x + bias) where there is no gate.

SwiGLU and GeGLU in one pass over what the projection made, in one tensor or two. The activation is float32
inside and is rounded before the product, as the models do it.

*Source:* Shazeer 2020; transformers 5.23 activations.py, models/llama (two projections, the gate is what is
activated) and modernbert (one, whose first half is).
"""

from __future__ import annotations

from typing import no_type_check

import torch

from kernels.language import check_rows, jit, launch, tl

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
# Elements of one program: 8 for each thread of 4 warps, which are a load of 16 bytes in half precision.
_BLOCK = 1024
_WARPS = 4


@jit
@no_type_check
def _activate(x, ACTIVATION: tl.constexpr):
    """float32 -> float32."""
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(y)) / 2 is sigmoid(2 y).
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        # Unlike a maximum this keeps what is not a number.
        x = tl.where(x < 0.0, 0.0, x)
    return x


@jit
@no_type_check
def _gated_kernel(
    GATE, UP, OUT, gate_stride, up_stride, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    is_there = columns < size
    gate = tl.load(GATE + row * gate_stride + columns, mask=is_there, other=0.0)
    up = tl.load(UP + row * up_stride + columns, mask=is_there, other=0.0)
    active = _activate(gate.to(tl.float32), ACTIVATION).to(gate.dtype)
    product = active.to(tl.float32) * up.to(tl.float32)
    tl.store(OUT + row * size + columns, product.to(OUT.dtype.element_ty), mask=is_there)


@jit
@no_type_check
def _bias_kernel(
    X, BIAS, OUT, x_stride, size, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    is_there = columns < size
    x = tl.load(X + row * x_stride + columns, mask=is_there, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(BIAS + columns, mask=is_there, other=0.0).to(tl.float32)
    tl.store(OUT + row * size + columns, _activate(x, ACTIVATION).to(OUT.dtype.element_ty), mask=is_there)


def gated_activation(
    gate: torch.Tensor, up: torch.Tensor | None = None, *, activation: str, is_gate_first: bool = True
) -> torch.Tensor:
    """gate and up [t, f], or both in one tensor [t, 2 f], the gate first or last -> act(gate) * up [t, f].

    The gate is what is activated, whatever a model calls it. Rows may lie apart. Raises ValueError for
    shapes, dtypes and activations that do not fit.
    """
    gate, up = _halves(gate, up, is_gate_first)
    _check(gate, activation)
    if up.shape != gate.shape or up.dtype != gate.dtype or up.stride(1) != 1:
        raise ValueError(f"up is {up.dtype} {list(up.shape)} beside gate {gate.dtype} {list(gate.shape)}")
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    size = gate.shape[1]
    programs = len(gate) * -(-size // _BLOCK)
    strides = (gate.stride(0), up.stride(0))
    launch(
        _gated_kernel,
        programs,
        *(gate, up, out, *strides, size),
        ACTIVATION=activation,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return out


def bias_activation(x: torch.Tensor, bias: torch.Tensor | None = None, *, activation: str) -> torch.Tensor:
    """act(x + bias) for x [t, f], whose rows may lie apart, and bias [f] -> [t, f]. Raises ValueError."""
    _check(x, activation)
    size = x.shape[1]
    if bias is not None and (bias.shape != (size,) or bias.dtype != x.dtype or bias.stride(0) != 1):
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)} for x {x.dtype} {list(x.shape)}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        _bias_kernel,
        len(x) * -(-size // _BLOCK),
        # What the kernel does not look at stands for a bias that is not there.
        *(x, x if bias is None else bias, out, x.stride(0), size),
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return out


def _halves(
    gate: torch.Tensor, up: torch.Tensor | None, is_gate_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if up is not None:
        return gate, up
    if gate.ndim != 2 or gate.shape[1] % 2:
        raise ValueError(f"gate and up in one tensor are {list(gate.shape)}; they are [t, 2 f]")
    first, second = gate.chunk(2, dim=1)
    return (first, second) if is_gate_first else (second, first)


def _check(x: torch.Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; they are {', '.join(ACTIVATIONS)}")
    check_rows(x=x)


def activate_reference(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Of any shape."""
    if activation == "silu":
        return torch.nn.functional.silu(x)
    if activation == "relu":
        return torch.relu(x)
    return torch.nn.functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def gated_activation_reference(
    gate: torch.Tensor, up: torch.Tensor | None = None, *, activation: str, is_gate_first: bool = True
) -> torch.Tensor:
    """As `gated_activation`."""
    gate, up = _halves(gate, up, is_gate_first)
    return activate_reference(gate, activation) * up


def bias_activation_reference(
    x: torch.Tensor, bias: torch.Tensor | None = None, *, activation: str
) -> torch.Tensor:
    """As `bias_activation`."""
    return activate_reference(x if bias is None else x + bias, activation)
