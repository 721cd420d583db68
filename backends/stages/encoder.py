"""The encoder stage: input_ids [1, t], length [1, n] -> hidden [1, t, h], texts of all requests that wait in
packed passes; last_hidden [1, n, h] instead where the pipeline's heads read one token of each text only.

With key_length [1, n] where some tokens of a sequence are not to be looked at, and first_length [1, n] where
pairs are told apart.

Where the pipeline's heads are fused into it, the encoder hands out their outputs instead of hidden states.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from backends import device, import_cache, lean_imports, shared_prefix
from backends.contract import (
    FIRST_LENGTH,
    GRID,
    HIDDEN,
    INPUT_IDS,
    KEY_LENGTH,
    LAST_HIDDEN,
    LENGTH,
    PATCHES,
    ErrorCode,
)
from backends.device import TORCH_DTYPES, compute_dtype, place, weight_format
from backends.encode import encode, pass_tokens
from backends.encode_images import ImageEncoder, choose_image_encoder
from backends.errors import RequestError
from backends.families import family_of
from backends.forward import Forward, PackedForward
from backends.graphs import GraphedForward
from backends.grouping import neighbours
from backends.heads import HEADS, encoder_inputs, only_row
from backends.heads.dense import has_own_code
from backends.last_token import token_rows
from backends.options import WIRE_DTYPES
from backends.ragged import Lengths, Ragged, positions
from backends.self_check import choose_forward
from backends.stages.base import StageContext
from backends.stages.continuous import ContinuousStage, Work
from backends.stages.loaded_head import LoadedHead, Reading
from backends.stages.request import StageRequest
from backends.stages.response import Answer
from backends.stages.server_counters import ServerCounters
from backends.tally import Count
from backends.turns import Job, Piece, Places, Turns
from backends.vision import Images
from backends.warm_up import warm_up
from kernels.transfer import to_device

# Passes that run side by side on a CPU, each on part of the cores: 6 850 tokens/s in two passes of one core
# each, 5 960 in one pass on both. With more of them Python itself becomes the limit.
_MOST_WORKERS = 4
# A full pass takes a GPU seconds; kernels are compiled at load.
_GPU_STUCK_AFTER_S = 120.0
# To fill a turn with texts that begin alike so many budgets are looked at: what is shared counts once.
_SHARING_REACH = 4

logger = logging.getLogger(__name__)


@dataclass
class _Work(Work):
    """The inputs of one request, and the states that are done so far."""

    ids: torch.Tensor
    """int64 [t]."""
    offsets: Lengths
    """[n + 1]: where each text begins."""
    keys: Lengths | None
    firsts: Lengths | None
    inputs: Mapping[str, torch.Tensor]
    """What fused heads read besides the states."""
    missing: int
    """Texts without which the answer is not whole."""
    hidden: torch.Tensor | None = None
    """[t, h], or [n, h] where one token of each text is read; None where nothing was done yet."""

    def lengths(self, places: Places) -> Lengths:
        """Tokens of some of the texts."""
        return (self.offsets[1:] - self.offsets[:-1])[places]

    def tokens(self, places: Places) -> Lengths:
        """[u]: where the tokens of some of the texts are."""
        lengths = self.lengths(places)
        return np.repeat(self.offsets[places], lengths) + positions(lengths)


class EncoderStage(ContinuousStage[_Work]):
    """Runs the family's model on sequences of all requests that wait."""

    def setup(self, context: StageContext) -> None:
        # Before transformers is imported.
        import_cache.install()
        options = context.options
        self.threads = options.threads or len(os.sched_getaffinity(0))
        # Set before the first operation: the thread pool keeps the size that it was born with.
        torch.set_num_threads(self.threads)
        self.device = place(context.device)
        dtype = compute_dtype(options.dtype, self.device, options.quantization)
        quantization = weight_format(options.quantization, options.dtype, self.device)
        family = family_of(context.checkpoint, options.model_type)
        tells_apart = family.tells_pairs_apart(context.checkpoint.config)
        extra = encoder_inputs(context.checkpoint, context.heads, tells_pairs_apart=tells_apart)
        self.has_key_length, self.has_first_length = KEY_LENGTH in extra, FIRST_LENGTH in extra

        config = context.checkpoint.config
        causality = family.causality(config, options.causal, options.model_type)

        def load(attention: str | None) -> torch.nn.Module:
            return lean_imports.with_meta_kernels(
                lambda: family.load(context.checkpoint, attention, dtype, self.device, causality)
            )

        self.checkpoint = context.checkpoint
        self.row = only_row(context.checkpoint, context.heads)
        self.max_batch_tokens = pass_tokens(
            options.max_batch_tokens, self.device, dtype, context.checkpoint.hidden_size
        )
        self.wire_dtype = TORCH_DTYPES[WIRE_DTYPES[options.dtype]]
        is_causal = causality is not None and causality.is_causal
        plain = choose_forward(
            load,
            family,
            dict(config),
            context.name,
            shares_prefixes=options.share_prefix and is_causal,
            quantization=quantization,
            must_quantize=options.quantization != "auto",
        )
        self.forward = plain
        if options.cuda_graphs and self.device.type == "cuda" and isinstance(plain, PackedForward):
            self.forward = GraphedForward(plain)
        self.images: ImageEncoder | None = None
        if family.vision is not None:
            self.images = choose_image_encoder(
                self.forward, family.vision, context.checkpoint, options, self.max_batch_tokens
            )
        self.heads: list[LoadedHead] = []
        if options.fuse_heads:
            one_row = self.row is not None
            names = [name for name in HEADS if name in context.heads]
            self.heads = [LoadedHead(n, context, self.device, reads_one_row=one_row) for n in names]
            logger.info("the heads %s run in this process", ", ".join(names))
        # Several threads compute; nobody knows whether a checkpoint's own code bears that.
        is_own = has_own_code(context.checkpoint)
        if self.images is not None:
            self.images.tally = self.tally
        self.turn_of_heads: AbstractContextManager[Any] = threading.Lock() if is_own else nullcontext()
        if self.device.type == "cuda":
            warm_up(plain, family.most_tokens(context.checkpoint))
            self.stuck_after_s = _GPU_STUCK_AFTER_S
        else:
            self.workers = min(self.threads, _MOST_WORKERS)
        if self.forward.shares_prefixes and self.images is None:
            self.turns = Turns(self.max_batch_tokens, reach=_SHARING_REACH, measure=_count_distinct)
        else:
            self.turns = Turns(self.max_batch_tokens, is_whole=self.images is not None)
        logger.info(
            "%s on %s in %s, %s, %d threads",
            family.name,
            self.device,
            str(dtype).removeprefix("torch.")
            + ("" if quantization == "none" else f", weights in {quantization}"),
            _way(self.forward),
            torch.get_num_threads(),
        )
        name = options.served_model_name or context.name.rsplit(".", 1)[0]
        self.counters = ServerCounters({"model": name}, self.tally)
        if causality is not None:
            logger.info("%s: %s", "causal" if causality.is_causal else "bidirectional", causality.reason)

    def finalize(self) -> None:
        super().finalize()
        self.counters.stop()

    def prepare(self, worker: int, *, is_alone: bool) -> None:
        # torch keeps this number for each thread.
        torch.set_num_threads(self.threads if worker == 0 and is_alone else self.threads // self.workers)

    def is_out_of_memory(self, error: Exception) -> bool:
        return device.is_out_of_memory(error)

    def free_memory(self) -> None:
        device.free_memory(self.device)

    def check_device(self) -> None:
        device.check(self.device)

    def admit(self, request: StageRequest) -> Job[_Work]:
        wanted = self._wanted(request)
        for head in wanted:
            head.check(request.parameters)
        lengths: Lengths = request.array(LENGTH)[0].astype(np.int64)
        ids = request.array(INPUT_IDS)[0]
        if not len(lengths) or lengths.min() < 0 or int(lengths.sum()) != len(ids):
            raise RequestError(
                ErrorCode.INVALID_INPUT,
                f"{LENGTH} tells of {int(lengths.sum())} tokens in {len(lengths)} texts, but {INPUT_IDS} "
                f"holds {len(ids)}; give each text's number of tokens, and their ids end to end",
            )
        work = _Work(
            request,
            torch.from_numpy(ids.astype(np.int64)),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            request.array(KEY_LENGTH)[0].astype(np.int64) if self.has_key_length else None,
            request.array(FIRST_LENGTH)[0].astype(np.int64) if self.has_first_length else None,
            {name: torch.from_numpy(request.array(name)[0]) for head in wanted for name in head.inputs},
            missing=len(lengths),
        )
        if self.images is not None:
            # Patches weigh as much as tokens; a request with images is computed as a whole.
            lengths = np.append(lengths[:-1], lengths[-1] + request.array(PATCHES).shape[1])
        return Job(work, lengths)

    def compute(self, pieces: Sequence[Piece[_Work]]) -> list[torch.Tensor]:
        """Hidden states [t, h] of each piece, or [n, h] where one token of each text is read."""
        self.tally.add(Count.TURNS)
        works = [piece.job.content for piece in pieces]
        lengths = [piece.job.content.lengths(piece.places) for piece in pieces]
        tokens = _tokens(pieces)
        rows = None if self.row is None else token_rows(self.row, tokens, self.checkpoint)
        with torch.inference_mode():
            if self.images is not None:
                images = _images([work.request for work in works])
                hidden = self.images(tokens, images, self.wire_dtype, rows)
            else:
                keys = _of_texts([work.keys for work in works], pieces)
                firsts = _of_texts([work.firsts for work in works], pieces)
                hidden = encode(
                    self.forward,
                    tokens,
                    self.max_batch_tokens,
                    self.wire_dtype,
                    keys,
                    firsts,
                    rows,
                    tally=self.tally,
                )
        sizes = [int(one.sum()) if rows is None else len(one) for one in lengths]
        return list(torch.split(hidden, sizes))

    def keep(self, piece: Piece[_Work], result: torch.Tensor) -> Answer | None:
        work = piece.job.content
        name = HIDDEN if self.row is None else LAST_HIDDEN
        count = len(work.offsets) - 1
        if len(piece.places) == count:
            return {name: result[None]}
        if work.hidden is None:
            size = len(work.ids) if self.row is None else count
            work.hidden = result.new_empty((size, result.shape[1]))
        rows = work.tokens(piece.places) if self.row is None else piece.places
        work.hidden.index_copy_(0, to_device(rows, result.device), result)
        work.missing -= len(piece.places)
        return {name: work.hidden[None]} if work.missing == 0 else None

    def finish(self, works: Sequence[_Work], answers: Sequence[Answer]) -> Sequence[Answer | RequestError]:
        if not self.heads:
            return answers
        name = HIDDEN if self.row is None else LAST_HIDDEN
        states: list[torch.Tensor] = [answer[name][0] for answer in answers]
        finished: list[Answer | RequestError] = []
        # Requests that share a head's pass are copied for it: no more of them than a turn's tokens.
        for group in neighbours(map(len, states), self.max_batch_tokens):
            with self.turn_of_heads:
                finished.extend(self._apply_heads([works[i] for i in group], [states[i] for i in group]))
        return finished

    def _apply_heads(
        self, works: Sequence[_Work], states: Sequence[torch.Tensor]
    ) -> list[Answer | RequestError]:
        merged: list[Answer | RequestError] = [{} for _ in works]
        readings = [self._reading(work, rows) for work, rows in zip(works, states, strict=True)]
        wanted = [self._wanted(work.request) for work in works]
        for head in self.heads:
            askers = [i for i in range(len(works)) if head in wanted[i]]
            for i, answer in zip(askers, head([readings[i] for i in askers]), strict=True):
                before = merged[i]
                if isinstance(before, RequestError):
                    continue
                merged[i] = answer if isinstance(answer, RequestError) else before | answer
        return merged

    def _reading(self, work: _Work, hidden: torch.Tensor) -> Reading:
        lengths = np.diff(work.offsets) if self.row is None else np.ones(len(hidden), np.int64)
        return Reading(work.request.parameters, hidden, lengths, work.inputs)

    def _wanted(self, request: StageRequest) -> list[LoadedHead]:
        """The heads of which the request gets an output; in an ensemble that is all of them."""
        return [head for head in self.heads if head.outputs & request.wanted]


def _tokens(pieces: Sequence[Piece[_Work]]) -> Ragged:
    """The ids of all pieces, end to end."""
    works = [piece.job.content for piece in pieces]
    ids = [work.ids[torch.from_numpy(work.tokens(p.places))] for work, p in zip(works, pieces, strict=True)]
    lengths = [work.lengths(p.places) for work, p in zip(works, pieces, strict=True)]
    return Ragged(torch.cat(ids), np.concatenate(lengths))


def _count_distinct(pieces: Sequence[Piece[_Work]]) -> int:
    """Tokens that are computed for the pieces, shared ones counted once."""
    tokens = _tokens(pieces)
    return shared_prefix.count_distinct(tokens.values.numpy(), tokens.lengths)


def _way(forward: Forward) -> str:
    """How it runs, in a line of the log."""
    if not forward.is_packed:
        return "padded"
    shares = ", shared prefixes once" if forward.shares_prefixes else ""
    return f"packed{shares}{', CUDA graphs' if isinstance(forward, GraphedForward) else ''}"


def _images(batch: Sequence[StageRequest]) -> Images:
    """The images of all requests, in their order."""
    grids = np.concatenate([request.array(GRID)[0] for request in batch]).astype(np.int64)
    patches = np.concatenate([request.array(PATCHES)[0] for request in batch])
    return Images(torch.from_numpy(patches), grids)


def _of_texts(rows: Sequence[Lengths | None], pieces: Sequence[Piece[_Work]]) -> Lengths | None:
    """A number of each text of the pieces; None where the pipeline has none."""
    parts = [row[p.places] for row, p in zip(rows, pieces, strict=True) if row is not None]
    return np.concatenate(parts) if parts else None
