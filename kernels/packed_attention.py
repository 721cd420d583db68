"""Attention over a packed batch: every token attends within its own sequence only.

softmax(q k^T * scaling + mask) v for each sequence, with grouped key/value heads (GQA), an optional causal
mask, an optional window and an optional soft cap of the scores. The function has the signature of
transformers' AttentionInterface, so that one function serves every model class that has the interface.

Sequences of equal length that lie side by side run as one batch: with the longest first, as
backends.ragged.cut_by_budget orders them, this is the fast path of a CPU, with no padding at all.

A sequence may go on from others in the row: then its tokens look at those as well, and lie behind them.

On a GPU one kernel does all sequences at once (kernels/varlen_attention.py).

*Source:* transformers 5.23 masking_utils.py and modeling_utils.py for the contract; a sliding window is an
exclusive bound there in every family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F

from kernels.attention_plan import Plans, Ranges, largest_block, last_plan

# transformers gives special treatment to names that hold "flash", "sdpa", "flex_attention", "paged|" or "/".
NAME = "packed"
# Queries of one block of windowed attention, at least: smaller ones would not fill the matrix unit.
_LEAST_BLOCK = 128
# Queries of one block behind a prefix, whose mask is written out.
_PREFIX_BLOCK = 512
# Keys of sequences behind one prefix that are put together at once, prefixes counted for each.
_MAX_KEYS = 65536

Run = tuple[int, int, int, Ranges]
"""Number of sequences, length, key length, prefix of neighbours that are alike."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    sequence_lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
    prefixes: Sequence[Ranges] | None = None,
    on_attention: Callable[[], None] | None = None,
    plans: Plans | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, Hq, t, D], key and value [1, Hkv, t, D], sequence_lengths on the host -> [1, t, Hq, D], None.

    `key_lengths` says how many tokens at the beginning of each sequence are looked at, all of them without
    it. `prefixes` says for each sequence which ranges of the row it goes on from, in their order; their
    tokens count as its first positions. `on_attention` is called once for every call: a model that never
    calls it does not use this function. `plans` stand for all the lengths, where a kernel computes. On a CPU
    tokens behind the last sequence belong to none, and get zeros. Raises RuntimeError for a call that does
    not come from a packed batch.
    """
    if attention_mask is not None or sequence_lengths is None or query.shape[0] != 1:
        raise RuntimeError(f"{type(module).__name__} reached packed attention without a packed batch")
    for name in ("s_aux", "position_bias"):
        if unused.get(name) is not None:
            raise NotImplementedError(f"packed attention has no {name}, which {type(module).__name__} needs")
    if on_attention is not None:
        on_attention()
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda:
        # Triton is not imported where there is no use for it.
        from kernels import varlen_attention

        if varlen_attention.takes(query, key, value):
            plan = (last_plan if plans is None else plans).get(
                (sequence_lengths, key_lengths, prefixes),
                device=query.device,
                causal=causal,
                max_block=largest_block(query.shape[-1], query.dtype),
            )
            # [1, H, t, D] -> [t, H, D], views
            q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
            return varlen_attention.varlen_attention(
                q, k, v, plan, scaling=scaling, causal=causal, window=sliding_window, softcap=softcap
            )[None], None
    if plans is not None:
        raise RuntimeError(f"no kernel takes the attention of {type(module).__name__}, so it takes no plan")
    runs = list(_runs(sequence_lengths, key_lengths, prefixes))
    return _attend(query, key, value, runs, causal, scaling, sliding_window, softcap), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    runs: Sequence[Run],
    causal: bool,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """query [1, Hq, t, D], key and value [1, Hkv, t, D] -> [1, t, Hq, D]."""
    sizes = [count * length for count, length, _, _ in runs]
    n_behind = query.shape[2] - sum(sizes)
    # [1, t, Hq, D] of each run: to put them together at once takes half the operations of writing each to its
    # place, which with a few tokens are what takes the time.
    parts: list[torch.Tensor] = []
    for (count, length, key_length, prefix), q, k, v in zip(
        runs, *(_cut(x, sizes, n_behind) for x in (query, key, value)), strict=True
    ):
        if count > 1:
            # [1, H, count * length, D] -> [count, H, length, D], views
            q, k, v = (x.view(-1, count, length, x.shape[-1]).transpose(0, 1) for x in (q, k, v))
        if key_length < length:
            k, v = k[:, :, :key_length], v[:, :, :key_length]
        if prefix:
            k, v = _behind(key, k, prefix), _behind(value, v, prefix)
        if softcap is None and not prefix and (window is None or window >= length):
            part = F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            ).transpose(1, 2)
        else:
            part = _attend_in_blocks(q, k, v, key_length, causal, scaling, window, softcap)
        parts.append(part.reshape(1, count * length, *part.shape[2:]))
    if n_behind or not parts:
        parts.append(query.new_zeros(1, n_behind, query.shape[1], value.shape[3]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _cut(x: torch.Tensor, sizes: Sequence[int], n_behind: int) -> Sequence[torch.Tensor]:
    """[1, H, t, D] -> views along t; what lies behind them is left out."""
    if len(sizes) == 1 and not n_behind:
        return (x,)
    cuts: Sequence[torch.Tensor] = x.split([*sizes, n_behind], dim=2)
    return cuts[: len(sizes)]


def _attend_in_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_length: int,
    causal: bool,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """q [n, Hq, length, D], k and v [n, Hkv, offset + key_length, D] -> [n, length, Hq, D]."""
    offset = k.shape[2] - key_length
    parts = []
    for first, last, keys, mask in _blocks(q.shape[2], key_length, causal, window, q.device, offset):
        block = (q[:, :, first:last], k[:, :, keys], v[:, :, keys])
        plain_causal = causal and mask is None
        if softcap is None:
            part = F.scaled_dot_product_attention(
                *block,
                attn_mask=mask,
                is_causal=plain_causal,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        else:
            part = _softcap_attention(*block, mask, plain_causal, scaling, softcap)
        parts.append(part.transpose(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _runs(
    lengths: Sequence[int],
    key_lengths: Sequence[int] | None = None,
    prefixes: Sequence[Ranges] | None = None,
) -> Iterator[Run]:
    """Every run of neighbours that are alike; empty ones left out."""
    kinds = zip(lengths, key_lengths or lengths, prefixes or [()] * len(lengths), strict=True)
    for (length, key_length, prefix), run in groupby(kinds):
        count = sum(1 for _ in run)
        # Every sequence of a run gets a copy of its prefix.
        ahead = sum(stop - first for first, stop in prefix)
        step = max(1, _MAX_KEYS // (ahead + length)) if ahead else count
        for done in range(0, count if length else 0, step):
            yield min(step, count - done), length, key_length, prefix


def _behind(row: torch.Tensor, own: torch.Tensor, prefix: Ranges) -> torch.Tensor:
    """Keys or values of sequences [count, H, length, D] with those of their prefix, out of the row
    [1, H, t, D], before them.
    """
    ahead = torch.cat([row[0, :, first:stop] for first, stop in prefix], dim=1)
    return torch.cat([ahead.expand(len(own), *ahead.shape), own], dim=2)


Block = tuple[int, int, slice, torch.Tensor | None]


def _blocks(
    length: int, key_length: int, causal: bool, window: int | None, device: torch.device, offset: int = 0
) -> Iterator[Block]:
    """(first query, end of the queries, their keys, mask) of every block of a sequence that has `offset` keys
    before its own.

    One block where nothing is cut off. With a window, a block of queries sees so few keys that neither time
    nor memory grows with the square of the length.
    """
    keys = offset + key_length
    if window is None or window >= max(offset + length, keys):
        if not (causal and offset):
            yield 0, length, slice(0, keys), None
            return
        window = offset + length
    size = _PREFIX_BLOCK if window >= offset + length else max(window, _LEAST_BLOCK)
    for first in range(0, length, size):
        last = min(first + size, length)
        begin = min(max(0, offset + first - window + 1), keys - 1)
        end = max(min(keys, offset + (last if causal else last + window - 1)), begin + 1)
        places = torch.arange(offset + first, offset + last, device=device)
        distance = places[:, None] - torch.arange(begin, end, device=device)
        allowed = distance.abs() < window
        # A token that only looks may lie further than a window behind the last key. It then gets nothing,
        # zeros, as from torch's own function.
        yield first, last, slice(begin, end), allowed & (distance >= 0) if causal else allowed


def _softcap_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.tanh((q @ k.transpose(-1, -2)) * scaling / softcap) * softcap
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.float().softmax(-1).to(q.dtype) @ v
