"""Attention over a packed batch on a GPU: every token attends within its own sequence only.

softmax(q k^T * scaling + mask) v, one program for a block of queries of one sequence and one head, with the
online softmax over blocks of keys. Which blocks there are is planned on the host (kernels/attention_plan.py).
Blocks of keys that every query of the block sees are computed without a mask.

*Source:* FlashAttention-2 (Dao 2023) as in triton's tutorial 06; the semantics are those of
kernels/packed_attention.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import no_type_check

import torch

from kernels.attention_plan import Plan, Ranges
from kernels.language import jit, launch, power_of_two, tl

# For each size of a block of queries. 64 rows are what a warp group of Hopper multiplies at once; two of them
# take turns between the matrix unit and the softmax.
_WARPS = {16: 1, 32: 2, 64: 4, 128: 8}
_FORMATS = (torch.bfloat16, torch.float16, torch.float32)
_MAX_HEAD_DIM = 256
_LOG2_E = math.log2(math.e)


@jit
@no_type_check
def _load_rows(pointer, stride, rows, end, D: tl.constexpr, BLOCK_D: tl.constexpr, IS_MASKED: tl.constexpr):
    """Rows of one head, [rows, BLOCK_D]."""
    dims = tl.arange(0, BLOCK_D)
    pointers = pointer + rows[:, None] * stride + dims[None, :]
    if IS_MASKED:
        loaded = tl.load(pointers, mask=(rows[:, None] < end) & (dims[None, :] < D), other=0.0)
    elif D < BLOCK_D:
        loaded = tl.load(pointers, mask=dims[None, :] < D, other=0.0)
    else:
        loaded = tl.load(pointers)
    return loaded


@jit
@no_type_check
def _attend(
    acc, total, peak, q, k, v, k_stride, v_stride, places, first, last, end, scale, softcap, window,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, IS_MASKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Blocks of keys from `first` to `last` of one range; `places` [BLOCK_M] of the queries count from its
    first token. Scores are in units of log 2.
    """
    for n in range(first, last, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        key = _load_rows(k, k_stride, keys, end, D, BLOCK_D, IS_MASKED)
        # float32 is exact, not TF32; it says nothing to the smaller formats.
        scores = tl.dot(q, tl.trans(key), input_precision="ieee")
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (1 + e^2x), which is right at both ends.
            scores = softcap * (1 - 2 / (1 + tl.exp2(scores * scale)))
            factor = 1.0
        else:
            # Multiplied late, so that it and the subtraction are one instruction.
            factor = scale
        if IS_MASKED:
            distance = places[:, None] - keys[None, :]
            seen = keys[None, :] < end
            if IS_CAUSAL:
                seen = seen & (distance >= 0)
            if HAS_WINDOW:
                seen = seen & (distance < window)
                if not IS_CAUSAL:
                    seen = seen & (distance > -window)
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
        # A row that has seen nothing yet would give -inf - -inf.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if IS_MASKED else new_peak
        weights = tl.exp2(scores * factor - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        value = _load_rows(v, v_stride, keys, end, D, BLOCK_D, IS_MASKED)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return acc, total, peak


@jit
@no_type_check
def _attention_kernel(
    Q, K, V, OUT, TABLE, q_token, q_head, k_token, k_head, v_token, v_head, scale, softcap, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_PREFIXES: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head; the heads of a block run side by side and share its keys in the
    cache. Strides are in units of UNIT elements, which tells the compiler how wide it may load.
    """
    head = tl.program_id(0) % HEADS
    block = TABLE + tl.program_id(0) // HEADS * 5
    row = tl.load(block)
    count = tl.minimum(tl.load(block + 1) - row, BLOCK_M)
    position = tl.load(block + 2)
    ranges = TABLE + tl.load(block + 3)
    n_ranges = tl.load(block + 4) if HAS_PREFIXES else 1

    rows = tl.arange(0, BLOCK_M)
    q_base = Q + row.to(tl.int64) * (q_token * UNIT) + head * (q_head * UNIT)
    q = _load_rows(q_base, q_token * UNIT, rows, count, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for i in range(n_ranges):
        start = tl.load(ranges + i * 3).to(tl.int64)
        size = tl.load(ranges + i * 3 + 1)
        # Of the first query, from the range's first token.
        place = position - tl.load(ranges + i * 3 + 2)
        k = K + start * (k_token * UNIT) + head // GROUP * (k_head * UNIT)
        v = V + start * (v_token * UNIT) + head // GROUP * (v_head * UNIT)
        # Keys that a query sees: first to end; those that all see: full_first to full_end.
        first = 0
        full_first = 0
        end = size
        full_end = size
        if HAS_WINDOW:
            first = tl.maximum(place - window + 1, 0)
            full_first = tl.maximum(place + count - window, 0)
            if not IS_CAUSAL:
                end = tl.minimum(end, place + count - 1 + window)
                full_end = tl.minimum(full_end, place + window)
        if IS_CAUSAL:
            end = tl.minimum(end, place + count)
            full_end = tl.minimum(full_end, place + 1)
        if HAS_WINDOW:
            left = first
            first += (tl.maximum(full_first - first, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
            acc, total, peak = _attend(
                acc, total, peak, q, k, v, k_token * UNIT, v_token * UNIT, place + rows,
                left, tl.minimum(first, end), end, scale, softcap, window,
                D, BLOCK_D, BLOCK_N, True, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
            )  # fmt: skip
        middle = first + tl.maximum(full_end - first, 0) // BLOCK_N * BLOCK_N
        acc, total, peak = _attend(
            acc, total, peak, q, k, v, k_token * UNIT, v_token * UNIT, place + rows,
            first, middle, end, scale, softcap, window,
            D, BLOCK_D, BLOCK_N, False, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
        )  # fmt: skip
        acc, total, peak = _attend(
            acc, total, peak, q, k, v, k_token * UNIT, v_token * UNIT, place + rows,
            middle, end, end, scale, softcap, window,
            D, BLOCK_D, BLOCK_N, True, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
        )  # fmt: skip

    # A query that sees nothing gets zeros.
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    dims = tl.arange(0, BLOCK_D)
    out = OUT + (row.to(tl.int64) * HEADS + head) * D + rows[:, None] * (HEADS * D) + dims[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=(rows[:, None] < count) & (dims[None, :] < D))


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    *,
    scaling: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    block_keys: int | None = None,
) -> torch.Tensor:
    """q [t, Hq, D], k and v [u, Hkv, D] of one dtype, strides of tokens and heads free -> [t, Hq, D].

    A token sees those less than `window` away; a causal one sees none behind it. `block_keys` is for tests.
    Raises ValueError for shapes, strides and dtypes that do not fit.
    """
    _check(q, k, v, plan)
    heads, head_dim = q.shape[1:]
    scaling = head_dim**-0.5 if scaling is None else scaling
    if scaling <= 0 or (window is not None and window < 1) or (softcap is not None and softcap <= 0):
        raise ValueError(f"scaling {scaling}, window {window} and softcap {softcap} must be above 0")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block_d = power_of_two(head_dim, least=16)
    keys, warps, stages = _key_block(plan.block, block_d, q.dtype)
    strides = [*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]]
    unit = math.gcd(16, *strides)
    launch(
        _attention_kernel,
        plan.n_blocks * heads,
        *(q, k, v, out, plan.table),
        *(stride // unit for stride in strides),
        scale=scaling * _LOG2_E if softcap is None else 2 * scaling * _LOG2_E / softcap,
        softcap=0.0 if softcap is None else softcap * _LOG2_E,
        window=window or 0,
        HEADS=heads,
        GROUP=heads // k.shape[1],
        D=head_dim,
        UNIT=unit,
        BLOCK_M=plan.block,
        BLOCK_N=block_keys or keys,
        BLOCK_D=block_d,
        IS_CAUSAL=causal,
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_PREFIXES=plan.has_prefixes,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the kernel is there and made for heads [..., D] of this format and size."""
    is_format = q.dtype in _FORMATS and q.dtype == k.dtype == v.dtype
    return tl is not None and is_format and q.shape[-1] == k.shape[-1] == v.shape[-1] <= _MAX_HEAD_DIM


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> None:
    if (
        q.ndim != 3
        or k.ndim != 3
        or k.shape != v.shape
        or q.shape[2] != k.shape[2]
        or q.shape[1] % k.shape[1]
    ):
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(
            f"q, k and v are {shapes}; they are [t, Hq, D] and twice [u, Hkv, D], Hq a multiple of Hkv"
        )
    if q.shape[0] != plan.n_tokens or k.shape[0] < plan.last_key:
        raise ValueError(
            f"{q.shape[0]} queries and {k.shape[0]} keys do not fit a plan for {plan.n_tokens} and "
            f"{plan.last_key}"
        )
    if q.shape[2] > _MAX_HEAD_DIM:
        raise ValueError(f"heads of {q.shape[2]} are too wide; {_MAX_HEAD_DIM} is the limit")
    if {k.dtype, v.dtype} != {q.dtype} or q.dtype not in _FORMATS:
        raise ValueError(
            f"q, k and v are {q.dtype}, {k.dtype}, {v.dtype}; they need one floating-point format"
        )
    if any(x.stride(2) != 1 for x in (q, k, v)):
        raise ValueError("the components of a head must lie side by side")


def _key_block(block: int, block_d: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Keys of a block, warps, and how many blocks are on their way at once: what the shared memory holds."""
    if dtype == torch.float32:
        # No matrix unit: every product is an instruction of the unrolled loop, shared by as many threads as
        # there may be.
        return 16, 8, 1
    if block < 64:
        return 32, _WARPS[block], 3
    if block_d > 128:
        return 32, _WARPS[block], 3
    return (128 if block == 128 and block_d <= 64 else 64), _WARPS[block], 3


def varlen_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int] | None = None,
    prefixes: Sequence[Ranges] | None = None,
    *,
    scaling: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The same by one masked softmax for each sequence, in the format of the inputs. The CPU's fast way is
    kernels/packed_attention.py.
    """
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    scaling = q.shape[2] ** -0.5 if scaling is None else scaling
    groups = q.shape[1] // k.shape[1]
    start = 0
    for i, length in enumerate(lengths):
        own = (start, start + (length if key_lengths is None else key_lengths[i]))
        ahead = () if prefixes is None else prefixes[i]
        keys, values = (
            torch.cat([x[a:b] for a, b in (*ahead, own)]).repeat_interleave(groups, 1) for x in (k, v)
        )
        scores = torch.einsum("qhd,khd->hqk", q[start : start + length], keys) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        first = sum(b - a for a, b in ahead)
        positions = torch.arange(first, first + length, device=q.device)
        distance = positions[:, None] - torch.arange(len(keys), device=q.device)
        seen = torch.ones_like(distance, dtype=torch.bool) if window is None else distance.abs() < window
        if causal:
            seen &= distance >= 0
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        # A row of nothing but -inf is no number.
        weights = weights.masked_fill(~seen.any(-1)[:, None], 0.0)
        out[start : start + length] = torch.einsum("hqk,khd->qhd", weights, values)
        start += length
    return out
