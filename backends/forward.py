"""A family's model over a ragged batch: packed, or padded where its class takes no attention function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from backends.families.base import Family
from backends.ragged import Lengths, Ragged, positions
from backends.vision import SeenRow
from kernels import packed_attention
from kernels.attention_plan import Ranges
from kernels.transfer import to_device

# Tokens of a row that is filled up for every model.
_SHORT = 256
# Sizes from one power of two to the next, of longer ones.
_SIZES_OF_LONG = 16


class Forward(Protocol):
    """input_ids int64 [t] -> hidden [t, h] in the model's dtype, on the model's device.

    `key_lengths` [n] says how many tokens at the beginning of each sequence are looked at, `first_lengths`
    [n] how many belong to the first text of a pair; None is all. `images` stand for some of the tokens.
    """

    model: torch.nn.Module
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
        images: SeenRow | None = None,
    ) -> torch.Tensor: ...

    def padding(self, lengths: Lengths) -> int:
        """Tokens computed beside those of sequences of `lengths`, of which none stands for an image."""
        ...


@dataclass(frozen=True)
class Segments:
    """Sequences that go on from others of the same pass."""

    starts: Lengths
    """[n] the position of each one's first token."""
    prefixes: Sequence[Ranges]
    """[n] what each looks at besides itself."""


class PackedForward:
    """One row that holds all sequences end to end. No padding is computed but what `row_size` adds to it."""

    is_packed = True
    shares_prefixes = False

    def __init__(self, model: torch.nn.Module, family: Family, config: dict[str, Any]) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.family = family
        self.position_offset = family.position_offset(config)
        self.attention_calls = 0
        self.fills_rows = self.device.type == "cpu"
        self.fills_long_rows = False
        """Where products of any number of rows are compiled for it; the self-check sets it."""

    def __call__(
        self,
        input_ids: Ragged,
        key_lengths: Lengths | None = None,
        first_lengths: Lengths | None = None,
        segments: Segments | None = None,
        images: SeenRow | None = None,
    ) -> torch.Tensor:
        arguments: dict[str, Any] = dict(self.rows(input_ids, first_lengths, segments))
        n_tokens = len(input_ids.values)
        if images is None:
            if more := self.padding(input_ids.lengths):
                # Every table of embeddings has a row 0.
                arguments = {name: F.pad(row, (0, more)) for name, row in arguments.items()}
        else:
            arguments.update(image_states=images.states, image_places=images.places)
            if images.positions is not None:
                # [3, 1, u]: they count from the beginning of each whole sequence already.
                arguments["position_ids"] = images.positions[:, None]
        hidden = self.run(
            input_ids.lengths.tolist(),
            key_lengths=None if key_lengths is None else key_lengths.tolist(),
            prefixes=None if segments is None else segments.prefixes,
            **arguments,
        )
        return hidden[:n_tokens]

    def padding(self, lengths: Lengths) -> int:
        n_tokens = int(lengths.sum())
        if not self.fills_rows:
            return 0
        return row_size(n_tokens, fills_long=self.fills_long_rows) - n_tokens

    def rows(
        self, input_ids: Ragged, first_lengths: Lengths | None = None, segments: Segments | None = None
    ) -> dict[str, torch.Tensor]:
        """The numbers of each token that the model is given by name, int64 [1, t]."""
        places = input_ids.positions + self.position_offset
        if segments is not None:
            places = places + to_device(segments.starts, places.device)[input_ids.segments]
        rows = {"input_ids": input_ids.values[None], "position_ids": places[None]}
        if self.family.has_token_types:
            rows["token_type_ids"] = _token_types(input_ids, first_lengths)[None]
        return rows

    def run(self, lengths: Sequence[int], **arguments: Any) -> torch.Tensor:
        """hidden [t, h] of sequences of `lengths`; `arguments` are those of the model and its attention."""
        output = self.model(
            sequence_lengths=lengths,
            on_attention=self._count,
            **self.family.call_arguments,
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
        self.arguments = family.call_arguments
        self.pad_id = int(config.get("pad_token_id") or 0)

    def __call__(
        self,
        input_ids: Ragged,
        key_lengths: Lengths | None = None,
        first_lengths: Lengths | None = None,
        segments: Segments | None = None,
        images: SeenRow | None = None,
    ) -> torch.Tensor:
        if segments is not None or images is not None:
            raise ValueError("a padded pass has no segments and no images")
        rows = input_ids.split()
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id)
        own = _mask(input_ids.lengths, ids)
        keys = own if key_lengths is None else _mask(key_lengths, ids)
        arguments = dict(self.arguments)
        if first_lengths is not None:
            arguments["token_type_ids"] = (own & ~_mask(first_lengths, ids)).long()
        output = self.model(input_ids=ids, attention_mask=keys.long(), **arguments)
        hidden = output.last_hidden_state
        # Where the tokens are is known here: to ask the mask would be to wait for the device.
        places = positions(input_ids.lengths) + hidden.shape[1] * np.repeat(
            np.arange(len(rows)), input_ids.lengths
        )
        return hidden.reshape(-1, hidden.shape[-1])[to_device(places, hidden.device)]  # type: ignore[no-any-return]

    def padding(self, lengths: Lengths) -> int:
        return int(len(lengths) * lengths.max() - lengths.sum())


def row_size(n_tokens: int, *, fills_long: bool = False) -> int:
    """How many tokens a row on a CPU is filled up to, with such as belong to no sequence.

    oneDNN compiles a product for each number of rows that it meets, which takes 3 ms for all of a pass of
    all-MiniLM-L6-v2 and 3 MB; for one of 24 sizes it has been done. Four tokens more take 0.3 ms (2 cores,
    AVX2). Rows of more than 256 tokens are filled up, by 2 % on average, where oneDNN multiplies them too.
    """
    if n_tokens <= _SHORT:
        step = 8 if n_tokens <= _SHORT // 2 else 16
    elif fills_long:
        step = (1 << (n_tokens - 1).bit_length() - 1) // _SIZES_OF_LONG
    else:
        step = 1
    return -(-n_tokens // step) * step


def _token_types(input_ids: Ragged, first_lengths: Lengths | None) -> torch.Tensor:
    """int64 [t]: 1 for the tokens of a pair's second text."""
    if first_lengths is None:
        return torch.zeros_like(input_ids.values)
    firsts = to_device(first_lengths, input_ids.values.device)
    return (input_ids.positions >= firsts[input_ids.segments]).long()


def _mask(lengths: Lengths, ids: torch.Tensor) -> torch.Tensor:
    """bool [n, s]: the first tokens of each row, `lengths` [n] of them."""
    return torch.arange(ids.shape[1], device=ids.device)[None] < to_device(lengths, ids.device)[:, None]


def register_attention() -> None:
    """Makes the packed attention function known to transformers, under the name that models are
    loaded with.
    """
    from transformers import AttentionInterface

    # No mask function is registered under this name: that is what makes every attention mask None.
    AttentionInterface.register(packed_attention.NAME, packed_attention.packed_attention)
