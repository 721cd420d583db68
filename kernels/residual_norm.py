"""LayerNorm and RMSNorm of each token, of the sum with a residual if there is one.

LayerNorm: (x - mean) / sqrt(variance + eps) * weight + bias. RMSNorm: x / sqrt(mean(x^2) + eps) * weight, or
* (1 + weight) in Gemma's models. Everything is float32 inside, but what a model rounds is rounded here as
well: the sum, and of Llama's RMSNorm what the weight is multiplied with.

*Source:* transformers 5.23 models/llama, qwen3 (cast, then weight) and gemma (weight, then cast);
torch.nn.functional.layer_norm; Ba et al. 2016, Zhang and Sennrich 2019.
"""

from __future__ import annotations

from typing import no_type_check

import torch

from kernels.language import check_rows, jit, launch, power_of_two, tl

# Elements of one program, at least: rows as short as a head are taken several at a time.
_LEAST_BLOCK = 2048
# The longest row that the registers of one program hold.
_MAX_SIZE = 32768


@jit(do_not_specialize=["n_rows"])
@no_type_check
def _norm_kernel(
    X, RESIDUAL, WEIGHT, BIAS, OUT, SUM, x_stride, residual_stride, n_rows, eps,
    SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SUM: tl.constexpr, IS_RMS: tl.constexpr, ADDS_ONE: tl.constexpr,
):  # fmt: skip
    """ROWS rows, whole, in registers: everything is read and written once."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    is_column = columns < SIZE
    is_there = (rows < n_rows) & is_column
    kind = OUT.dtype.element_ty
    x = tl.load(X + rows * x_stride + columns, mask=is_there, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(RESIDUAL + rows * residual_stride + columns, mask=is_there, other=0.0).to(tl.float32)
        rounded = x.to(kind)
        x = rounded.to(tl.float32)
        if HAS_SUM:
            tl.store(SUM + rows * SIZE + columns, rounded, mask=is_there)
    weight = tl.load(WEIGHT + columns, mask=is_column, other=0.0).to(tl.float32)
    if not IS_RMS:
        x = tl.where(is_column, x - (tl.sum(x, 1) / SIZE)[:, None], 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, 1) / SIZE + eps)[:, None]
    if IS_RMS and not ADDS_ONE:
        x = x.to(kind).to(tl.float32)
    x = x * (weight + 1.0) if ADDS_ONE else x * weight
    if HAS_BIAS:
        x += tl.load(BIAS + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(OUT + rows * SIZE + columns, x.to(kind), mask=is_there)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """x and residual [t, h], weight and bias [h], all of one dtype -> normed [t, h].

    Rows may lie apart. Raises ValueError for shapes and dtypes that do not fit.
    """
    return _norm(x, residual, weight, bias, eps)[0]


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `layer_norm` -> normed and the sum x + residual, both [t, h]: for models that norm first."""
    return _norm(x, residual, weight, bias, eps, has_sum=True)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    adds_one: bool = False,
) -> torch.Tensor:
    """As `layer_norm`; `adds_one` is Gemma's kind."""
    return _norm(x, residual, weight, None, eps, is_rms=True, adds_one=adds_one)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, adds_one: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rms_norm` -> normed and the sum x + residual, both [t, h]."""
    return _norm(x, residual, weight, None, eps, has_sum=True, is_rms=True, adds_one=adds_one)


def _norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    has_sum: bool = False,
    is_rms: bool = False,
    adds_one: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, residual, weight, bias)
    size = x.shape[1]
    block = power_of_two(size)
    rows = max(1, _LEAST_BLOCK // block)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out) if has_sum else out
    launch(
        _norm_kernel,
        -(-len(x) // rows),
        x,
        # What a kernel does not look at stands for what is not there.
        x if residual is None else residual,
        weight,
        weight if bias is None else bias,
        out,
        total,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        len(x),
        eps,
        SIZE=size,
        ROWS=rows,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        HAS_SUM=has_sum,
        IS_RMS=is_rms,
        ADDS_ONE=adds_one,
        # 16 elements for each thread, which are two loads of 16 bytes in bfloat16.
        num_warps=min(max(rows * block // 512, 1), 16),
    )
    return out, total


def _check(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    check_rows(x=x)
    if not 0 < x.shape[1] <= _MAX_SIZE:
        raise ValueError(f"x is {list(x.shape)}; rows of 1 to {_MAX_SIZE} fit")
    if residual is not None and (residual.shape != x.shape or residual.stride(1) != 1):
        raise ValueError(f"residual is {list(residual.shape)} beside x {list(x.shape)}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and (vector.shape != x.shape[1:] or not vector.is_contiguous()):
            raise ValueError(f"{name} is {list(vector.shape)} for rows of {x.shape[1]}")
    kinds = {each.dtype for each in (x, residual, weight, bias) if each is not None}
    if len(kinds) != 1:
        raise ValueError(f"the tensors of a norm are {', '.join(sorted(map(str, kinds)))}, not of one format")


def layer_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """normed and the sum (x itself without a residual) [t, h]."""
    total = x if residual is None else x + residual
    return torch.nn.functional.layer_norm(total, total.shape[1:], weight, bias, eps), total


def rms_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    adds_one: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """normed and the sum (x itself without a residual) [t, h]."""
    total = x if residual is None else x + residual
    inner = torch.float64 if x.dtype == torch.float64 else torch.float32
    normed = total.to(inner)
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    if adds_one:
        return (normed * (1.0 + weight.to(inner))).to(x.dtype), total
    return weight * normed.to(x.dtype), total
