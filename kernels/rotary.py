"""Rotary positions, in place: of every head the two halves of its first dimensions are turned by an angle.

first' = first * cos - second * sin, second' = second * cos + first * sin, in float32. One program for a token
turns all its heads of q and k, so that cos and sin are read once.

*Source:* Su et al. 2021, in the layout of transformers 5.23 (rotate_half; models/modernbert computes it in
float32, models/phi turns a part of the dimensions).
"""

from __future__ import annotations

from typing import no_type_check

import torch

from kernels.language import jit, launch, power_of_two, tl


@jit
@no_type_check
def _turn(
    X, head_stride, cos_first, cos_second, sin_first, sin_second,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All heads of one token."""
    heads = tl.arange(0, BLOCK_H)[:, None]
    places = tl.arange(0, BLOCK)[None, :]
    pointers = X + heads * head_stride + places
    is_there = (heads < HEADS) & (places < HALF)
    first = tl.load(pointers, mask=is_there, other=0.0).to(tl.float32)
    second = tl.load(pointers + HALF, mask=is_there, other=0.0).to(tl.float32)
    kind = X.dtype.element_ty
    tl.store(pointers, (first * cos_first - second * sin_first).to(kind), mask=is_there)
    tl.store(pointers + HALF, (second * cos_second + first * sin_second).to(kind), mask=is_there)


@jit
@no_type_check
def _rotary_kernel(
    Q, K, COS, SIN, q_token, q_head, k_token, k_head, cos_token, sin_token,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    is_there = places < HALF
    cos = COS + token * cos_token + places
    sin = SIN + token * sin_token + places
    # The halves are alike in every model, but nothing says that they must be.
    cos_first = tl.load(cos, mask=is_there, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + HALF, mask=is_there, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin, mask=is_there, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + HALF, mask=is_there, other=0.0).to(tl.float32)[None, :]
    _turn(
        Q + token * q_token, q_head, cos_first, cos_second, sin_first, sin_second,
        Q_HEADS, HALF, BLOCK_Q, BLOCK,
    )  # fmt: skip
    _turn(
        K + token * k_token, k_head, cos_first, cos_second, sin_first, sin_second,
        K_HEADS, HALF, BLOCK_K, BLOCK,
    )  # fmt: skip


def rotate_(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [t, Hq, D] and k [t, Hkv, D], strides of tokens and heads free, are turned where they are by cos and
    sin [t, r]: the first r of the D dimensions. Gives them back.

    Raises ValueError for shapes, strides and dtypes that do not fit.
    """
    _check(q, k, cos, sin)
    q_heads, k_heads, half = q.shape[1], k.shape[1], cos.shape[1] // 2
    block = power_of_two(half)
    block_q, block_k = power_of_two(q_heads), power_of_two(k_heads)
    launch(
        _rotary_kernel,
        len(q),
        *(q, k, cos, sin, *q.stride()[:2], *k.stride()[:2], cos.stride(0), sin.stride(0)),
        Q_HEADS=q_heads,
        K_HEADS=k_heads,
        HALF=half,
        BLOCK=block,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        num_warps=min(max(max(block_q, block_k) * block // 256, 1), 8),
    )
    return q, k


def _check(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if q.ndim != 3 or k.ndim != 3 or q.shape[::2] != k.shape[::2] or q.dtype != k.dtype:
        raise ValueError(
            f"q is {q.dtype} {list(q.shape)} and k {k.dtype} {list(k.shape)}; they are [t, H, D]"
        )
    size = cos.shape[-1]
    if cos.shape != (len(q), size) or sin.shape != cos.shape or size % 2 or not 0 < size <= q.shape[2]:
        raise ValueError(
            f"cos is {list(cos.shape)} and sin {list(sin.shape)} for {len(q)} tokens with heads of "
            f"{q.shape[2]}"
        )
    for name, x in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        if x.stride(-1) != 1:
            raise ValueError(f"the components of {name} must lie side by side")
        if x.ndim == 3 and any(stride == 0 and n > 1 for stride, n in zip(x.stride(), x.shape, strict=True)):
            raise ValueError(f"{name} is expanded: what is one in memory cannot be turned by two angles")


def rotate_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rotate_`, in new tensors."""
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    inner = torch.float64 if x.dtype == torch.float64 else torch.float32
    size = cos.shape[1]
    turned = x[..., :size].to(inner)
    first, second = turned.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(inner), sin[:, None].to(inner)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned.to(x.dtype), x[..., size:]], -1)
