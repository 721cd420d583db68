"""The encoder stage: input_ids [1, t], length [1, n] -> hidden [1, t, h], all requests of a batch in packed
passes; last_hidden [1, n, h] instead where the pipeline's heads read one token of each text only.

With key_length [1, n] where some tokens of a sequence are not to be looked at, and first_length [1, n] where
pairs are told apart.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import numpy as np
import torch

from backends.contract import (
    FIRST_LENGTH,
    GRID,
    HIDDEN,
    INPUT_IDS,
    KEY_LENGTH,
    LAST_HIDDEN,
    LENGTH,
    PATCHES,
)
from backends.device import TORCH_DTYPES, compute_dtype, place
from backends.encode import encode
from backends.encode_images import ImageEncoder, choose_image_encoder
from backends.families import family_of
from backends.forward import Forward
from backends.grouping import neighbours
from backends.heads import encoder_inputs, only_row
from backends.last_token import token_rows
from backends.options import WIRE_DTYPES
from backends.ragged import Lengths, Ragged
from backends.self_check import choose_forward
from backends.stages.base import Answer, Stage, StageContext, StageRequest
from backends.vision import Images

# What the activations of one pass may take on a CPU, where larger passes are slower: all-MiniLM-L6-v2 runs
# 27 000 tokens/s in passes of 16 384 tokens, 37 000 in passes of 5461 (2 cores). A token takes about 32
# numbers for each component of its state.
_CPU_PASS_BYTES = 2**27
_NUMBERS_PER_COMPONENT = 32
_LEAST_CPU_TOKENS = 1024
# Hidden states of so many forward passes are kept at once. More would let more sequences share a pass, fewer
# would leave passes half full at the end of each group.
_PASSES_IN_MEMORY = 4

logger = logging.getLogger(__name__)


class EncoderStage(Stage):
    """Runs the family's model on the tokens of all requests at once."""

    def setup(self, context: StageContext) -> None:
        options = context.options
        # Set before the first operation: the thread pool keeps the size that it was born with.
        torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
        self.device = place(context.device)
        dtype = compute_dtype(options.dtype, self.device)
        family = family_of(context.checkpoint, options.model_type)
        tells_apart = family.tells_pairs_apart(context.checkpoint.config)
        extra = encoder_inputs(context.checkpoint, context.heads, tells_pairs_apart=tells_apart)
        self.has_key_length, self.has_first_length = KEY_LENGTH in extra, FIRST_LENGTH in extra

        config = context.checkpoint.config
        causality = family.causality(config, options.causal, options.model_type)

        def load(attention: str | None) -> torch.nn.Module:
            return family.load(context.checkpoint, attention, dtype, self.device, causality)

        self.checkpoint = context.checkpoint
        self.row = only_row(context.checkpoint, context.heads)
        self.max_batch_tokens = options.max_batch_tokens
        if self.device.type == "cpu":
            size = _NUMBERS_PER_COMPONENT * dtype.itemsize * context.checkpoint.hidden_size
            most = max(_LEAST_CPU_TOKENS, _CPU_PASS_BYTES // size)
            self.max_batch_tokens = min(self.max_batch_tokens, most)
        self.wire_dtype = TORCH_DTYPES[WIRE_DTYPES[options.dtype]]
        is_causal = causality is not None and causality.is_causal
        self.forward = choose_forward(
            load,
            family,
            dict(config),
            context.name,
            shares_prefixes=options.share_prefix and is_causal,
        )
        self.images: ImageEncoder | None = None
        if family.vision is not None:
            self.images = choose_image_encoder(
                self.forward, family.vision, context.checkpoint, options, self.max_batch_tokens
            )
        logger.info(
            "%s on %s in %s, %s, %d threads",
            family.name,
            self.device,
            str(dtype).removeprefix("torch."),
            _way(self.forward),
            torch.get_num_threads(),
        )
        if causality is not None:
            logger.info("%s: %s", "causal" if causality.is_causal else "bidirectional", causality.reason)

    def cut(self, batch: Sequence[StageRequest]) -> list[range]:
        """Groups of requests with hidden states of a few passes: a batch holds any number of long lists."""
        return neighbours(map(self._size, batch), _PASSES_IN_MEMORY * self.max_batch_tokens)

    def _size(self, request: StageRequest) -> int:
        """Tokens and patches."""
        names = (INPUT_IDS,) if self.images is None else (INPUT_IDS, PATCHES)
        return sum(request.array(name).shape[1] for name in names)

    def run(self, batch: Sequence[StageRequest]) -> list[Answer]:
        ids = np.concatenate([request.array(INPUT_IDS)[0] for request in batch])
        lengths = [request.array(LENGTH)[0] for request in batch]
        tokens = Ragged(torch.from_numpy(ids.astype(np.int64)), np.concatenate(lengths).astype(np.int64))
        keys = _row(batch, KEY_LENGTH) if self.has_key_length else None
        firsts = _row(batch, FIRST_LENGTH) if self.has_first_length else None
        rows = None if self.row is None else token_rows(self.row, tokens, self.checkpoint)
        with torch.inference_mode():
            if self.images is not None:
                hidden = self.images(tokens, _images(batch), self.wire_dtype, rows)
            else:
                hidden = encode(
                    self.forward, tokens, self.max_batch_tokens, self.wire_dtype, keys, firsts, rows
                )
        sizes = [int(one.sum()) if rows is None else len(one) for one in lengths]
        name = HIDDEN if rows is None else LAST_HIDDEN
        return [{name: part[None]} for part in torch.split(hidden, sizes)]


def _way(forward: Forward) -> str:
    """How it runs, in a line of the log."""
    if not forward.is_packed:
        return "padded"
    return "packed, shared prefixes once" if forward.shares_prefixes else "packed"


def _images(batch: Sequence[StageRequest]) -> Images:
    """The images of all requests, in their order."""
    grids = np.concatenate([request.array(GRID)[0] for request in batch]).astype(np.int64)
    patches = np.concatenate([request.array(PATCHES)[0] for request in batch])
    return Images(torch.from_numpy(patches), grids)


def _row(batch: Sequence[StageRequest], name: str) -> Lengths:
    """A [1, n] input of all requests, [n]."""
    row: Lengths = np.concatenate([request.array(name)[0] for request in batch]).astype(np.int64)
    return row
