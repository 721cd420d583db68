"""Sparse weights over a packed batch: SPLADE's vectors over the vocabulary, and BGE-M3's lexical weights.

SPLADE: log(1 + relu(logit)), the largest (or the sum) over each sequence's tokens. BGE-M3: a weight for each
token, and of equal tokens of a sequence the largest.

*Source:* sentence-transformers 6.2 sparse_encoder/modules/splade_pooling.py; FlagEmbedding 1.4.2
inference/embedder/encoder_only/m3.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import no_type_check

import numpy as np
import torch

from kernels.language import check_rows, jit, launch, offsets_of, tl
from kernels.transfer import to_device

POOLINGS = ("max", "sum")
# Tokens and words that one program has in flight: 16 independent loads of half precision for each thread.
_BLOCK_T, _BLOCK_V = 8, 256
# Tokens that one program weighs, and others that it compares them with at once.
_BLOCK_M, _BLOCK_N = 64, 64


@jit
@no_type_check
def _log1p(x):
    """log(1 + x) for x >= 0, right for the small ones as well (Kahan)."""
    sum_ = 1.0 + x
    return tl.where(sum_ == 1.0, x, tl.log(sum_) * (x / tl.where(sum_ == 1.0, 1.0, sum_ - 1.0)))


@jit
@no_type_check
def _splade_kernel(
    LOGITS, OFFSETS, OUT, token_stride, size, UNIT: tl.constexpr, LOGS: tl.constexpr, IS_SUM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One sequence and a part of the vocabulary. The stride is in units of UNIT elements, which tells the
    compiler how wide it may load: vocabularies are seldom a multiple of 16.
    """
    parts = tl.cdiv(size, BLOCK_V)
    segment = tl.program_id(0) // parts
    columns = tl.program_id(0) % parts * BLOCK_V + tl.arange(0, BLOCK_V)
    is_column = columns < size
    stop = tl.load(OFFSETS + segment + 1)
    pooled = tl.zeros([BLOCK_V], tl.float32)
    for block in range(tl.load(OFFSETS + segment), stop, BLOCK_T):
        rows = block + tl.arange(0, BLOCK_T)
        is_there = (rows < stop)[:, None] & is_column[None, :]
        pointers = LOGITS + rows.to(tl.int64)[:, None] * (token_stride * UNIT) + columns[None, :]
        values = tl.load(pointers, mask=is_there, other=0.0).to(tl.float32)
        if IS_SUM:
            values = tl.maximum(values, 0.0)
            for _ in tl.static_range(LOGS):
                values = _log1p(values)
            pooled += tl.sum(values, 0)
        else:
            # Beginning with 0 this is relu. The logarithm keeps the order: it is taken once, of the largest.
            pooled = tl.maximum(pooled, tl.max(values, 0))
    if not IS_SUM:
        for _ in tl.static_range(LOGS):
            pooled = _log1p(pooled)
    tl.store(OUT + segment.to(tl.int64) * size + columns, pooled, mask=is_column)


@jit
@no_type_check
def _lexical_kernel(
    WEIGHTS, IDS, UNUSED, TABLE, OUT, n_unused, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """A block of tokens against all of their sequence. TABLE has of every block its first token, and where
    its sequence begins and ends.
    """
    first = tl.load(TABLE + tl.program_id(0) * 3)
    start = tl.load(TABLE + tl.program_id(0) * 3 + 1)
    stop = tl.load(TABLE + tl.program_id(0) * 3 + 2)
    rows = first + tl.arange(0, BLOCK_M)
    ids = tl.load(IDS + rows, mask=rows < stop, other=-1)
    largest = tl.zeros([BLOCK_M], tl.float32)
    n_before = tl.zeros([BLOCK_M], tl.int32)
    for block in range(start, stop, BLOCK_N):
        columns = block + tl.arange(0, BLOCK_N)
        others = tl.load(IDS + columns, mask=columns < stop, other=-2)
        weights = tl.load(WEIGHTS + columns, mask=columns < stop, other=0.0).to(tl.float32)
        is_same = ids[:, None] == others[None, :]
        largest = tl.maximum(largest, tl.max(tl.where(is_same, weights[None, :], 0.0), 1))
        is_before = is_same & (columns[None, :] < rows[:, None])
        n_before += tl.sum(is_before.to(tl.int32), 1)
    for i in range(n_unused):
        largest = tl.where(ids == tl.load(UNUSED + i), 0.0, largest)
    tl.store(OUT + rows, tl.where(n_before == 0, largest, 0.0), mask=rows < stop)


def splade(
    logits: torch.Tensor, lengths: Sequence[int], *, pooling: str = "max", n_logs: int = 1
) -> torch.Tensor:
    """logits [t, v], lengths [n] on the host -> float32 [n, v]; zeros for a sequence without tokens.

    `n_logs` is 2 for checkpoints that say log1p_relu. Raises ValueError for what does not fit.
    """
    offsets = _check_splade(logits, lengths, pooling, n_logs)
    n, size = len(offsets) - 1, logits.shape[1]
    out = torch.empty(n, size, dtype=torch.float32, device=logits.device)
    unit = math.gcd(16, logits.stride(0))
    launch(
        _splade_kernel,
        n * -(-size // _BLOCK_V),
        *(logits, to_device(offsets, logits.device), out, logits.stride(0) // unit, size),
        UNIT=unit,
        LOGS=n_logs,
        IS_SUM=pooling == "sum",
        BLOCK_T=_BLOCK_T,
        BLOCK_V=_BLOCK_V,
        num_warps=4,
    )
    return out


def lexical_weights(
    weights: torch.Tensor, ids: torch.Tensor, lengths: Sequence[int], unused: torch.Tensor
) -> torch.Tensor:
    """weights [t], ids [t] (not below 0), lengths [n] on the host, unused [k] ids -> float32 [t].

    At the first token with an id in its sequence stands the largest weight that the id has there; 0 is where
    it is not positive, where the id was before, and for the ids of `unused`. How many are left is known on
    the device only, so to gather them is the caller's. Raises ValueError for shapes and dtypes that do not
    fit.
    """
    offsets = _check_lexical(weights, ids, lengths, unused)
    counts = -(-np.diff(offsets) // _BLOCK_M)
    owner = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    columns = (offsets[owner] + place * _BLOCK_M, offsets[owner], offsets[owner + 1])
    table = np.ascontiguousarray(np.stack(columns, 1).astype(np.int32))
    out = torch.empty(len(ids), dtype=torch.float32, device=weights.device)
    launch(
        _lexical_kernel,
        len(table),
        *(weights, ids, unused, to_device(table, weights.device), out, len(unused)),
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
        num_warps=4,
    )
    return out


def _check_splade(
    logits: torch.Tensor, lengths: Sequence[int], pooling: str, n_logs: int
) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    if pooling not in POOLINGS or n_logs not in (1, 2):
        raise ValueError(
            f"pooling {pooling!r} with {n_logs} logarithms; it takes {', '.join(POOLINGS)}, 1 or 2"
        )
    check_rows(logits=logits)
    return offsets_of(lengths, len(logits))


def _check_lexical(
    weights: torch.Tensor, ids: torch.Tensor, lengths: Sequence[int], unused: torch.Tensor
) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    if weights.ndim != 1 or weights.shape != ids.shape or unused.ndim != 1:
        raise ValueError(
            f"weights are {list(weights.shape)}, ids {list(ids.shape)}, unused {list(unused.shape)}"
        )
    if not weights.dtype.is_floating_point or {ids.dtype, unused.dtype} - {torch.int32, torch.int64}:
        raise ValueError(f"weights are {weights.dtype}, ids {ids.dtype} and unused {unused.dtype}")
    if not (weights.is_contiguous() and ids.is_contiguous() and unused.is_contiguous()):
        raise ValueError("weights, ids and unused must lie side by side")
    return offsets_of(lengths, len(ids))


def splade_reference(
    logits: torch.Tensor, lengths: Sequence[int], *, pooling: str = "max", n_logs: int = 1
) -> torch.Tensor:
    """As `splade`; float64 stays float64."""
    _check_splade(logits, lengths, pooling, n_logs)
    values = torch.relu(logits if logits.dtype == torch.float64 else logits.float())
    for _ in range(n_logs):
        values = values.log1p()
    out = values.new_zeros(len(lengths), logits.shape[1])
    for i, rows in enumerate(torch.split(values, list(lengths))):
        if len(rows):
            out[i] = rows.sum(0) if pooling == "sum" else rows.amax(0)
    return out


def lexical_weights_reference(
    weights: torch.Tensor, ids: torch.Tensor, lengths: Sequence[int], unused: torch.Tensor
) -> torch.Tensor:
    """As `lexical_weights`, by a matrix of who is equal in each sequence."""
    _check_lexical(weights, ids, lengths, unused)
    out = []
    given = (torch.relu(weights.float()), ids, torch.isin(ids, unused))
    for own, names, is_unused in zip(*(torch.split(x, list(lengths)) for x in given), strict=True):
        is_same = names[:, None] == names[None]
        largest = (own[None] * is_same).amax(1) if len(own) else own
        is_first = ~is_same.tril(-1).any(1)
        out.append(largest * (is_first & ~is_unused))
    return torch.cat(out) if out else weights.new_zeros(0, dtype=torch.float32)
