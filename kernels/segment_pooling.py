"""One vector for each sequence of a packed batch: the pooling modes of sentence-transformers.

One program for a sequence and a part of the components goes through the sequence's tokens once; nothing is
written but the answer. Unit length needs all components, so it is a second, small kernel over the answer.

*Source:* sentence-transformers 6.2 sentence_transformer/modules/pooling.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import no_type_check

import numpy as np
import torch

from kernels.language import check_rows, jit, launch, offsets_of, power_of_two, tl
from kernels.transfer import to_device

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# Tokens and components that one program has in flight: rows of 128 bytes, so that short batches fill a GPU.
_BLOCK_T, _BLOCK_H = 32, 64


@jit
@no_type_check
def _pooling_kernel(
    HIDDEN, TABLE, OUT, token_stride, size, MODE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """TABLE has of every sequence its first token, the first that is not skipped, and its end."""
    parts = tl.cdiv(size, BLOCK_H)
    segment = tl.program_id(0) // parts
    columns = tl.program_id(0) % parts * BLOCK_H + tl.arange(0, BLOCK_H)
    is_column = columns < size
    start = tl.load(TABLE + segment * 3)
    first = tl.load(TABLE + segment * 3 + 1)
    stop = tl.load(TABLE + segment * 3 + 2)
    if MODE == "cls" or MODE == "lasttoken":
        row = first if MODE == "cls" else stop - 1
        pooled = tl.load(HIDDEN + row.to(tl.int64) * token_stride + columns, mask=is_column).to(tl.float32)
    else:
        nothing = float("-inf") if MODE == "max" else 0.0
        pooled = tl.full([BLOCK_H], nothing, tl.float32)
        for block in range(first, stop, BLOCK_T):
            rows = block + tl.arange(0, BLOCK_T)
            is_there = (rows < stop)[:, None] & is_column[None, :]
            pointers = HIDDEN + rows.to(tl.int64)[:, None] * token_stride + columns[None, :]
            values = tl.load(pointers, mask=is_there, other=nothing).to(tl.float32)
            if MODE == "max":
                pooled = tl.maximum(pooled, tl.max(values, 0))
            else:
                if MODE == "weightedmean":
                    values = values * (rows - start + 1).to(tl.float32)[:, None]
                pooled += tl.sum(values, 0)
        count = (stop - first).to(tl.float32)
        if MODE == "mean":
            pooled = pooled / count
        elif MODE == "mean_sqrt_len_tokens":
            pooled = pooled / tl.sqrt(count)
        elif MODE == "weightedmean":
            # The weights are positions from 1 up: those of the skipped tokens are left out of their sum.
            pooled = pooled / (((first - start + 1) + (stop - start)).to(tl.float32) * count / 2)
    tl.store(OUT + segment.to(tl.int64) * size + columns, pooled, mask=is_column)


@jit
@no_type_check
def _unit_kernel(OUT, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    pointers = OUT + tl.program_id(0).to(tl.int64) * SIZE + columns
    values = tl.load(pointers, mask=columns < SIZE, other=0.0)
    norm = tl.maximum(tl.sqrt(tl.sum(values * values, 0)), 1e-12)
    tl.store(pointers, values / norm, mask=columns < SIZE)


def pool(
    hidden: torch.Tensor,
    lengths: Sequence[int],
    mode: str,
    *,
    skipped: Sequence[int] | None = None,
    normalizes: bool = False,
) -> torch.Tensor:
    """hidden [t, h], lengths [n] on the host -> float32 [n, h].

    `skipped` [n] leaves that many tokens at the beginning of each sequence out, but never all of one;
    lasttoken does not care, and weightedmean keeps the weights of the original positions. Raises ValueError
    for shapes that do not fit, and for a sequence without tokens.
    """
    table = _segments(hidden, lengths, mode, skipped)
    size = hidden.shape[1]
    out = torch.empty(len(table), size, dtype=torch.float32, device=hidden.device)
    launch(
        _pooling_kernel,
        len(table) * -(-size // _BLOCK_H),
        *(hidden, to_device(table, hidden.device), out, hidden.stride(0), size),
        MODE=mode,
        BLOCK_T=_BLOCK_T,
        BLOCK_H=_BLOCK_H,
        num_warps=4,
    )
    if normalizes:
        block = power_of_two(size)
        launch(_unit_kernel, len(out), out, SIZE=size, BLOCK=block, num_warps=min(max(block // 256, 1), 8))
    return out


def _segments(
    hidden: torch.Tensor, lengths: Sequence[int], mode: str, skipped: Sequence[int] | None
) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """int32 [n, 3]: first token, first that is not skipped, end."""
    if mode not in MODES:
        raise ValueError(f"unknown pooling mode {mode!r}; they are {', '.join(MODES)}")
    check_rows(hidden=hidden)
    offsets = offsets_of(lengths, len(hidden))
    counts = np.diff(offsets)
    if not counts.all():
        raise ValueError("a sequence without tokens has no embedding")
    left_out = np.zeros_like(counts) if skipped is None else np.asarray(skipped, np.int32)
    if left_out.shape != counts.shape or (left_out < 0).any():
        raise ValueError(f"skipped is {left_out.tolist()} for {len(counts)} sequences")
    starts = offsets[:-1]
    return np.stack([starts, starts + np.minimum(left_out, counts - 1), offsets[1:]], 1)


def pool_reference(
    hidden: torch.Tensor,
    lengths: Sequence[int],
    mode: str,
    *,
    skipped: Sequence[int] | None = None,
    normalizes: bool = False,
) -> torch.Tensor:
    """As `pool`; float64 stays float64."""
    table = _segments(hidden, lengths, mode, skipped)
    values = hidden if hidden.dtype == torch.float64 else hidden.float()
    pooled = [
        _pool_one(values[start:stop], int(first - start), mode) for start, first, stop in table.tolist()
    ]
    out = torch.stack(pooled) if pooled else values.new_zeros(0, hidden.shape[1])
    return torch.nn.functional.normalize(out, dim=-1) if normalizes else out


def _pool_one(whole: torch.Tensor, skipped: int, mode: str) -> torch.Tensor:
    """whole [s, h] -> [h]."""
    rest = whole[skipped:]
    if mode in ("cls", "lasttoken"):
        return rest[0] if mode == "cls" else whole[-1]
    if mode == "max":
        return rest.amax(0)
    if mode == "weightedmean":
        weights = torch.arange(skipped + 1, len(whole) + 1, device=whole.device, dtype=whole.dtype)[:, None]
        return (rest * weights).sum(0) / weights.sum()
    return rest.sum(0) / (math.sqrt(len(rest)) if mode == "mean_sqrt_len_tokens" else len(rest))
