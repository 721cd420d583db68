"""Runs a family's model over a ragged batch, packed where that is proved right, else padded.

Whether a model can run packed is found out at load: it must call the packed attention function, and two short
sequences packed must give what each gives alone. Some model classes (MPNet, DeBERTa) take no attention
function and would let every sequence look at its neighbours without any error: for those the padded way is
checked the same way, and a model that fails both is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError

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

    def __call__(
        self, input_ids: Ragged, key_lengths: Lengths | None = None, first_lengths: Lengths | None = None
    ) -> torch.Tensor: ...


class PackedForward:
    """One row that holds all sequences end to end. No padding is computed."""

    is_packed = True

    def __init__(self, model: torch.nn.Module, family: Family, config: dict[str, Any]) -> None:
        self.model = model
        self.family = family
        self.position_offset = family.position_offset(config)
        self.attention_calls = 0

    def __call__(
        self, input_ids: Ragged, key_lengths: Lengths | None = None, first_lengths: Lengths | None = None
    ) -> torch.Tensor:
        arguments: dict[str, Any] = {"position_ids": (input_ids.positions + self.position_offset)[None]}
        if self.family.has_token_types:
            arguments["token_type_ids"] = _token_types(input_ids, first_lengths)[None]
        output = self.model(
            input_ids=input_ids.values[None],
            sequence_lengths=input_ids.lengths.tolist(),
            key_lengths=None if key_lengths is None else key_lengths.tolist(),
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

    def __init__(self, model: torch.nn.Module, family: Family, config: dict[str, Any]) -> None:
        self.model = model
        self.arguments = family.forward_arguments
        self.pad_id = int(config.get("pad_token_id") or 0)

    def __call__(
        self, input_ids: Ragged, key_lengths: Lengths | None = None, first_lengths: Lengths | None = None
    ) -> torch.Tensor:
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


def choose_forward(load: Loader, family: Family, config: dict[str, Any], name: str) -> Forward:
    """The packed way if the model passes the self-check, else the padded way, with a logged warning.

    Raises CheckpointError when the model fails both. `name` stands in the messages.
    """
    register_attention()
    packed = PackedForward(_load(load, packed_attention.NAME, name), family, config)
    fault = _packed_fault(packed)
    if fault is None:
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
) -> torch.Tensor:
    """hidden [t, h] of all sequences in the order in which they came, in passes of at most
    `max_batch_tokens`.

    A sequence that is longer than that runs in a pass of its own. Padded, the padding counts.
    """
    hidden: torch.Tensor | None = None
    passes = cut_by_budget(
        input_ids.lengths, max_batch_tokens, ties=key_lengths, is_padded=not forward.is_packed
    )
    for order in passes:
        lengths = input_ids.lengths[order]
        tokens = torch.from_numpy(np.repeat(input_ids.offsets[order], lengths) + positions(lengths))
        tokens = tokens.to(input_ids.values.device)
        keys = None if key_lengths is None else key_lengths[order]
        firsts = None if first_lengths is None else first_lengths[order]
        out = forward(Ragged(input_ids.values[tokens], lengths), keys, firsts)
        if hidden is None:
            hidden = out.new_empty((input_ids.values.shape[0], out.shape[1]), dtype=dtype)
        hidden.index_copy_(0, tokens, out.to(dtype))
    if hidden is None:
        raise ValueError("a batch without sequences")
    return hidden


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
    device = next(forward.model.parameters()).device
    vocabulary = int(forward.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    lengths = np.array(_CHECK_LENGTHS)
    # Spread over the vocabulary; id 0 is padding in most vocabularies.
    ids = torch.arange(1, int(lengths.sum()) + 1, device=device) * 7919 % (vocabulary - 1) + 1
    batch = Ragged(ids, lengths)
    with torch.inference_mode():
        together = forward(batch).float()
        alone = torch.cat([forward(Ragged.pack([one])).float() for one in batch.split()])
    return float(torch.linalg.vector_norm(together - alone) / torch.linalg.vector_norm(alone))


def _tolerance(model: torch.nn.Module) -> float:
    return _TOLERANCE[next(model.parameters()).dtype]
