"""Runs a model over the sequences of a batch, in passes of a bounded number of tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from backends import shared_prefix
from backends.forward import Forward, Segments
from backends.ragged import Lengths, Ragged, cut_by_budget, positions
from backends.tally import Tally
from backends.vision import Seen
from kernels.transfer import to_device

# What the activations of one pass may take on a CPU, where larger passes are slower and short requests wait
# for them: all-MiniLM-L6-v2 in float32 runs 5 700 tokens/s in passes of 1024 tokens, 5 900 in passes of 2048,
# 5 500 in passes of 5461 (2 cores, AVX2).
_CPU_PASS_BYTES = 2**26 + 2**25
_NUMBERS_PER_COMPONENT = 32
_LEAST_CPU_TOKENS = 1024


def pass_tokens(max_batch_tokens: int, device: torch.device, dtype: torch.dtype, hidden_size: int) -> int:
    """How many tokens one pass may have: `max_batch_tokens`, and on a CPU, of a model this wide, no more than
    keep its activations small.
    """
    if device.type != "cpu":
        return max_batch_tokens
    bytes_per_token = _NUMBERS_PER_COMPONENT * dtype.itemsize * hidden_size
    return min(max_batch_tokens, max(_LEAST_CPU_TOKENS, _CPU_PASS_BYTES // bytes_per_token))


def encode(
    forward: Forward,
    input_ids: Ragged,
    max_batch_tokens: int,
    dtype: torch.dtype,
    key_lengths: Lengths | None = None,
    first_lengths: Lengths | None = None,
    rows: Lengths | None = None,
    seen: Seen | None = None,
    tally: Tally | None = None,
) -> torch.Tensor:
    """hidden [t, h] of all sequences in the order in which they came, in passes of at most
    `max_batch_tokens`.

    With `rows` [r], ascending, of these tokens only: [r, h]. A sequence that is longer than a pass runs in
    one of its own. Padded, the padding counts. `input_ids` are on the host. `seen` is what stands for images.
    Each pass is counted in `tally`.
    """
    ids = input_ids.values.numpy()
    count = len(ids) if rows is None else len(rows)
    # Where each token's state goes; -1 where nobody wants it.
    slots = np.arange(len(ids)) if rows is None else np.full(len(ids), -1)
    if rows is not None:
        slots[rows] = np.arange(count)
    if forward.shares_prefixes and key_lengths is None and first_lengths is None:
        passes = _shared_passes(forward, input_ids, max_batch_tokens, seen, tally)
    else:
        passes = _passes(forward, input_ids, max_batch_tokens, key_lengths, first_lengths, seen, tally)
    hidden: torch.Tensor | None = None
    for out, tokens, sources in passes:
        if hidden is None:
            hidden = out.new_empty((count, out.shape[1]), dtype=dtype)
        wanted = slots[tokens]
        if rows is not None:
            wanted, sources = (
                wanted[wanted >= 0],
                (np.flatnonzero(wanted >= 0) if sources is None else sources[wanted >= 0]),
            )
        if sources is not None:
            out = out[to_device(sources, out.device)]
        hidden.index_copy_(0, to_device(wanted, out.device), out.to(dtype))
    if hidden is None:
        raise ValueError("a batch without sequences")
    return hidden


_Passes = Iterator[tuple[torch.Tensor, Lengths, Lengths | None]]
"""States [u, h], the tokens of the batch that they are of, and where in them each of those is; None is in
order.
"""


def _passes(
    forward: Forward,
    input_ids: Ragged,
    max_batch_tokens: int,
    key_lengths: Lengths | None,
    first_lengths: Lengths | None,
    seen: Seen | None,
    tally: Tally | None,
) -> _Passes:
    orders = cut_by_budget(
        input_ids.lengths, max_batch_tokens, ties=key_lengths, is_padded=not forward.is_packed
    )
    for order in orders:
        lengths = input_ids.lengths[order]
        tokens = np.repeat(input_ids.offsets[order], lengths) + positions(lengths)
        keys = None if key_lengths is None else key_lengths[order]
        firsts = None if first_lengths is None else first_lengths[order]
        values = to_device(input_ids.values[torch.from_numpy(tokens)], forward.device)
        images = None if seen is None else seen.of(tokens)
        if tally is not None:
            tally.add_pass(len(tokens), padding=0 if images is not None else forward.padding(lengths))
        yield forward(Ragged(values, lengths), keys, firsts, images=images), tokens, None


def _shared_passes(
    forward: Forward, input_ids: Ragged, max_batch_tokens: int, seen: Seen | None, tally: Tally | None
) -> _Passes:
    names = input_ids.values.numpy()
    if seen is not None:
        # Two images have the same ids, and are not the same: no token of an image is like any other.
        names = np.where(seen.slots >= 0, -1 - seen.slots, names)
    for one in shared_prefix.plan(names, input_ids.lengths, max_batch_tokens):
        values = to_device(input_ids.values[torch.from_numpy(one.row)], forward.device)
        segments = Segments(one.starts, one.prefixes) if one.shares else None
        images = None if seen is None else seen.of(one.row)
        if tally is not None:
            padding = 0 if images is not None else forward.padding(one.lengths)
            tally.add_pass(len(one.row), shared=len(one.tokens) - len(one.row), padding=padding)
        out = forward(Ragged(values, one.lengths), segments=segments, images=images)
        yield out, one.tokens, one.sources
