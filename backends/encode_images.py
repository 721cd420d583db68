"""Runs a model of texts and images over the items of a batch."""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np
import torch

from backends.checkpoint import Checkpoint
from backends.encode import encode
from backends.errors import CheckpointError
from backends.families.base import ImageTokens, Vision
from backends.forward import Forward
from backends.mrope import mrope_positions
from backends.options import ServingOptions
from backends.ragged import Lengths, Ragged
from backends.self_check import check_seeing
from backends.tally import Tally
from backends.two_towers import TwoTowers, end_rows
from backends.vision import Images, Seen, Sees, see
from kernels.transfer import to_device


class ImageEncoder(Protocol):
    """Texts and images -> hidden states."""

    tally: Tally | None
    """Set to have its passes counted."""

    def __call__(
        self, input_ids: Ragged, images: Images, dtype: torch.dtype, rows: Lengths | None
    ) -> torch.Tensor:
        """[t, h], or with `rows` [r] of these tokens only; `images` in the order of their tokens."""


class Fused:
    """Images are words of a sequence."""

    def __init__(
        self, forward: Forward, tokens: ImageTokens, max_batch_tokens: int, *, has_axes: bool
    ) -> None:
        self.forward = forward
        self.model = cast(Sees, forward.model)
        self.tokens = tokens
        self.max_batch_tokens = max_batch_tokens
        self.has_axes = has_axes
        self.tally: Tally | None = None

    def __call__(
        self, input_ids: Ragged, images: Images, dtype: torch.dtype, rows: Lengths | None
    ) -> torch.Tensor:
        seen = self._see(input_ids, images) if len(images.grids) else None
        return encode(
            self.forward, input_ids, self.max_batch_tokens, dtype, rows=rows, seen=seen, tally=self.tally
        )

    def _see(self, input_ids: Ragged, images: Images) -> Seen:
        is_image = input_ids.values.numpy() == self.tokens.token
        states = see(self.model, images, self.max_batch_tokens)
        if int(is_image.sum()) != len(states):
            raise ValueError(f"{int(is_image.sum())} tokens stand for {len(states)} states of images")
        positions = None
        if self.has_axes:
            positions = mrope_positions(is_image, input_ids.lengths, images.grids, self.tokens.merge)
        slots = np.where(is_image, np.cumsum(is_image) - 1, -1)
        return Seen(states, slots, positions)


class Apart:
    """An item is a text or an image, and each has a model of its own."""

    def __init__(self, forward: Forward, tokens: ImageTokens, max_batch_tokens: int) -> None:
        self.forward = forward
        self.model = cast(TwoTowers, forward.model)
        self.tokens = tokens
        self.max_batch_tokens = max_batch_tokens
        self.tally: Tally | None = None

    def __call__(
        self, input_ids: Ragged, images: Images, dtype: torch.dtype, rows: Lengths | None
    ) -> torch.Tensor:
        """[n, d]: the vector of each item, whatever the rows."""
        first = input_ids.values.numpy()[input_ids.offsets[:-1]]
        is_image = first == self.tokens.token
        parts: list[torch.Tensor] = []
        if not is_image.all():
            texts = [row for row, image in zip(input_ids.split(), is_image, strict=True) if not image]
            parts.append(self._read(Ragged.pack(texts)))
        if is_image.any():
            parts.append(see(self.model, images, self.max_batch_tokens))
        found = torch.cat(parts).to(dtype)
        order = np.argsort(np.concatenate([np.flatnonzero(~is_image), np.flatnonzero(is_image)]))
        return found[to_device(order, found.device)]

    def _read(self, texts: Ragged) -> torch.Tensor:
        own = next(self.model.parameters()).dtype
        ends = end_rows(texts, self.model.eos)
        states = encode(self.forward, texts, self.max_batch_tokens, own, rows=ends, tally=self.tally)
        return self.model.project(states)


def choose_image_encoder(
    forward: Forward, vision: Vision, checkpoint: Checkpoint, options: ServingOptions, max_batch_tokens: int
) -> ImageEncoder:
    """A family's way. Raises CheckpointError for a model that sees an image differently beside others."""
    if not forward.is_packed:
        raise CheckpointError(f"{checkpoint.path}: a model of texts and images must run packed")
    tokens = vision.tokens(checkpoint.config)
    check_seeing(cast(Sees, forward.model), checkpoint, is_item=tokens.is_item)
    if tokens.is_item:
        return Apart(forward, tokens, max_batch_tokens)
    has_axes = vision.has_axes and options.image_positions == "mrope"
    return Fused(forward, tokens, max_batch_tokens, has_axes=has_axes)
