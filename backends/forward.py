"""Runs a family's model over a ragged batch, packed where that is proved right, else padded.

Whether a model can run packed is found out at load: it must call the packed attention function, and two short
sequences packed must give what each gives alone. Some model classes (MPNet, DeBERTa) take no attention
function and would let every sequence look at its neighbours without any error: for those the padded way is
checked the same way, and a model that fails both is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError

from backends import shared_prefix
from backends.errors import CheckpointError
from backends.families.base import Family
from backends.ragged import Lengths, Ragged, cut_by_budget, positions
from kernels import packed_attention

logger = logging.getLogger(__name__)

# Lengths of the sequences of the self-check: different, so that a shifted boundary shows.
_CHECK_LENGTHS = (5, 11)
# Largest relative error (norm of the difference over the norm) that rounding explains; a sequence that sees
# its neighbours is off by 0.1 and more.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


class Forward(Protocol):
    """input_ids int64 [t] -> hidden [t, h] in the model's dtype, on the model's device.

    `key_lengths` [n] says how many tokens at the beginning of each sequence are looked at, `first_lengths`
    [n] how many belong to the first text of a pair; None is all.
    """

    is_packed: bool
    shares_prefixes: bool
    """Whether it may be given segments that go on from others."""
    device: torch.device

    def __call__(
        self,
        input_ids: Ragged,
        key_lengths: Lengths | None = None,
        first_lengths: Lengths | None = None,
        segments: Segments | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Segments:
    """Sequences that go on from others of the same pass."""

    starts: Lengths
    """[n] the position of each one's first token."""
    prefixes: Sequence[packed_attention.Ranges]
    """[n] what each looks at besides itself."""


class PackedForward:
    """One row that holds all sequences end to end. No padding is computed."""

    is_packed = True
    shares_prefixes = False

    def __init__(self, model: torch.nn.Module, family: Family, config: dict[str, Any]) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.family = family
        self.position_offset = family.position_offset(config)
        self.attention_calls = 0

    def __call__(
        self,
        input_ids: Ragged,
        key_lengths: Lengths | None = None,
        first_lengths: Lengths | None = None,
        segments: Segments | None = None,
    ) -> torch.Tensor:
        places = input_ids.positions + self.position_offset
        if segments is not None:
            places = places + torch.from_numpy(segments.starts).to(places.device)[input_ids.segments]
        arguments: dict[str, Any] = {"position_ids": places[None]}
        if self.family.has_token_types:
            arguments["token_type_ids"] = _token_types(input_ids, first_lengths)[None]
        output = self.model(
            input_ids=input_ids.values[None],
            sequence_lengths=input_ids.lengths.tolist(),
            key_lengths=None if key_lengths is None else key_lengths.tolist(),
            prefixes=None if segments is None else segments.prefixes,
            on_attention=self._count,
            **self.family.forward_arguments,
            **arguments,
        )
        return output.last_hidden_state[0]  # type: ignore[no-any-return]

    def _count(self) -> None:
        self.attention_calls += 1


class PaddedForward:
    """One row for each sequence, padded to the longest: for models that take no attention function."""

    is_packed = False
    shares_prefixes = False

    def __init__(self, model: torch.nn.Module, family: Family, config: dict[str, Any]) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.arguments = family.forward_arguments
        self.pad_id = int(config.get("pad_token_id") or 0)

    def __call__(
        self,
        input_ids: Ragged,
        key_lengths: Lengths | None = None,
        first_lengths: Lengths | None = None,
        segments: Segments | None = None,
    ) -> torch.Tensor:
        if segments is not None:
            raise ValueError("a padded pass has no segments")
        rows = input_ids.split()
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id)
        own = _mask(input_ids.lengths, ids)
        keys = own if key_lengths is None else _mask(key_lengths, ids)
        arguments = dict(self.arguments)
        if first_lengths is not None:
            arguments["token_type_ids"] = (own & ~_mask(first_lengths, ids)).long()
        output = self.model(input_ids=ids, attention_mask=keys.long(), **arguments)
        return output.last_hidden_state[own]  # type: ignore[no-any-return]


def _token_types(input_ids: Ragged, first_lengths: Lengths | None) -> torch.Tensor:
    """int64 [t]: 1 for the tokens of a pair's second text."""
    if first_lengths is None:
        return torch.zeros_like(input_ids.values)
    firsts = torch.from_numpy(first_lengths).to(input_ids.values.device)
    return (input_ids.positions >= firsts[input_ids.segments]).long()


def _mask(lengths: Lengths, ids: torch.Tensor) -> torch.Tensor:
    """bool [n, s]: the first tokens of each row, `lengths` [n] of them."""
    return (
        torch.arange(ids.shape[1], device=ids.device)[None]
        < torch.from_numpy(lengths).to(ids.device)[:, None]
    )


Loader = Callable[[str | None], torch.nn.Module]
"""Name of an attention function, or None for the model's own choice -> the model."""


def choose_forward(
    load: Loader, family: Family, config: dict[str, Any], name: str, *, shares_prefixes: bool = False
) -> Forward:
    """The packed way if the model passes the self-check, else the padded way, with a logged warning.

    `shares_prefixes` is for causal models: what sequences begin with is computed once, if that is proved to
    change nothing. Raises CheckpointError when the model fails both ways. `name` stands in the messages.
    """
    register_attention()
    packed = PackedForward(_load(load, packed_attention.NAME, name), family, config)
    fault = _packed_fault(packed)
    if fault is None:
        if shares_prefixes:
            error = _check_sharing(packed)
            packed.shares_prefixes = error <= _tolerance(packed.model)
            if not packed.shares_prefixes:
                logger.warning(
                    "%s gives other numbers behind a shared prefix (relative error %.2g): every sequence is "
                    "computed whole, which is slower",
                    name,
                    error,
                )
        packed.attention_calls = 0
        return packed
    logger.warning("%s cannot run packed (%s): it runs padded, which is slower", name, fault)
    padded = PaddedForward(_load(load, None, name), family, config)
    error = _self_check(padded)
    if not error <= _tolerance(padded.model):
        raise CheckpointError(
            f"{name} gives other numbers in a batch than alone, packed ({fault}) and padded (relative error "
            f"{error:.2g}): it cannot be served right"
        )
    return padded


def encode(
    forward: Forward,
    input_ids: Ragged,
    max_batch_tokens: int,
    dtype: torch.dtype,
    key_lengths: Lengths | None = None,
    first_lengths: Lengths | None = None,
    rows: Lengths | None = None,
) -> torch.Tensor:
    """hidden [t, h] of all sequences in the order in which they came, in passes of at most
    `max_batch_tokens`.

    With `rows` [r], ascending, of these tokens only: [r, h]. A sequence that is longer than a pass runs in
    one of its own. Padded, the padding counts. `input_ids` are on the host.
    """
    ids = input_ids.values.numpy()
    count = len(ids) if rows is None else len(rows)
    # Where each token's state goes; -1 where nobody wants it.
    slots = np.arange(len(ids)) if rows is None else np.full(len(ids), -1)
    if rows is not None:
        slots[rows] = np.arange(count)
    if forward.shares_prefixes and key_lengths is None and first_lengths is None:
        passes = _shared_passes(forward, input_ids, max_batch_tokens)
    else:
        passes = _passes(forward, input_ids, max_batch_tokens, key_lengths, first_lengths)
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
            out = out[torch.from_numpy(sources).to(out.device)]
        hidden.index_copy_(0, torch.from_numpy(wanted).to(out.device), out.to(dtype))
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
) -> _Passes:
    orders = cut_by_budget(
        input_ids.lengths, max_batch_tokens, ties=key_lengths, is_padded=not forward.is_packed
    )
    for order in orders:
        lengths = input_ids.lengths[order]
        tokens = np.repeat(input_ids.offsets[order], lengths) + positions(lengths)
        keys = None if key_lengths is None else key_lengths[order]
        firsts = None if first_lengths is None else first_lengths[order]
        values = input_ids.values[torch.from_numpy(tokens)].to(forward.device)
        yield forward(Ragged(values, lengths), keys, firsts), tokens, None


def _shared_passes(forward: Forward, input_ids: Ragged, max_batch_tokens: int) -> _Passes:
    for one in shared_prefix.plan(input_ids.values.numpy(), input_ids.lengths, max_batch_tokens):
        values = torch.from_numpy(one.ids).to(forward.device)
        segments = Segments(one.starts, one.prefixes) if one.shares else None
        yield forward(Ragged(values, one.lengths), segments=segments), one.tokens, one.sources


def register_attention() -> None:
    """Makes the packed attention function known to transformers, under the name that models are
    loaded with.
    """
    from transformers import AttentionInterface

    # No mask function is registered under this name: that is what makes every attention mask None.
    AttentionInterface.register(packed_attention.NAME, packed_attention.packed_attention)


def _load(load: Loader, attention: str | None, name: str) -> torch.nn.Module:
    try:
        return load(attention)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "ignore_mismatched_sizes" in first_line:
            first_line = "they have other shapes than config.json says"
        raise CheckpointError(f"the weights of {name} cannot be loaded: {first_line}") from error


def _packed_fault(forward: PackedForward) -> str | None:
    try:
        error = _self_check(forward)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError) as problem:
        return f"the self-check failed: {problem}"
    if forward.attention_calls == 0:
        return f"{type(forward.model).__name__} takes no attention function"
    if not error <= _tolerance(forward.model):  # also when it is NaN
        return f"relative error {error:.2g} between packed and one by one"
    return None


def _self_check(forward: PackedForward | PaddedForward) -> float:
    """Relative error between two sequences in one batch and the same two one by one."""
    lengths = np.array(_CHECK_LENGTHS)
    batch = Ragged(_check_ids(forward, int(lengths.sum())), lengths)
    with torch.inference_mode():
        together = forward(batch).float()
        alone = torch.cat([forward(Ragged.pack([one])).float() for one in batch.split()])
    return float(torch.linalg.vector_norm(together - alone) / torch.linalg.vector_norm(alone))


def _check_sharing(forward: PackedForward) -> float:
    """Relative error between two sequences that begin alike computed whole, and behind a shared segment."""
    lengths = np.array([sum(_CHECK_LENGTHS)] * 2)
    ids = _check_ids(forward, int(lengths.sum()))
    shared, rest = _CHECK_LENGTHS[1], _CHECK_LENGTHS[0]
    first, second = ids[: shared + rest], torch.cat([ids[:shared], ids[-rest:]])
    row = Ragged(torch.cat([first[:shared], first[shared:], second[shared:]]), np.array([shared, rest, rest]))
    segments = Segments(np.array([0, shared, shared]), [(), ((0, shared),), ((0, shared),)])
    with torch.inference_mode():
        together = forward(row, segments=segments).float()
        alone = [forward(Ragged.pack([one])).float() for one in (first, second)]
    whole = torch.cat([alone[0], alone[1][shared:]])
    return float(torch.linalg.vector_norm(together - whole) / torch.linalg.vector_norm(whole))


def _check_ids(forward: PackedForward | PaddedForward, count: int) -> torch.Tensor:
    """int64 [count], spread over the vocabulary; id 0 is padding in most vocabularies."""
    vocabulary = int(forward.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    return torch.arange(1, count + 1, device=forward.device) * 7919 % (vocabulary - 1) + 1


def _tolerance(model: torch.nn.Module) -> float:
    return _TOLERANCE[next(model.parameters()).dtype]
