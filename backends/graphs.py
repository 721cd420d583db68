"""CUDA graphs for passes of few tokens: such a pass is launched at once, where launching its kernels one by
one takes longer than computing them.

A graph computes always the same number of tokens and blocks of attention. So the row is filled up to the next
of a few sizes with tokens that belong to no sequence, and the attention's plan with blocks that are empty. A
graph is captured when its size is first asked for, and its numbers compared with those of the pass as it was;
whatever goes wrong there turns graphs off, and the process goes on without them.

Never run on a GPU: the tests replay by running the captured function again, on the same tensors.

*Source:* torch 2.13 torch/cuda/graphs.py and its notes on CUDA graphs (one pool of memory for graphs that run
one after the other).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from backends.forward import PackedForward, Segments
from backends.ragged import Lengths, Ragged
from backends.self_check import relative_error, tolerance
from backends.vision import SeenRow
from kernels.attention_plan import BLOCKS, FixedPlans, choose_block, count_blocks, most_blocks

# Tokens of the rows. Over the last a GPU computes for longer than a host launches.
_SIZES = (64, 128, 256, 512, 1024, 2048)

logger = logging.getLogger(__name__)

Run = Callable[[], torch.Tensor]
"""Computes from tensors that stay where they are; the answer is good until the next call."""
Capture = Callable[[Run], Run]
"""What is to be done -> what does the same again, by one launch."""


class CudaCapture:
    """Captures graphs. All of them share the memory of what lies between input and output, as much as the
    largest takes, which nothing else gets: they run one after the other, and an answer is copied before the
    next. Of its own each has its inputs and its output.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        # Where a capture fails torch leaves its stream the current one; the outer context puts it back.
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # Once before: what compiles kernels or makes tables on the host cannot be captured.
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile, as a head in this process does.
            with torch.cuda.graph(graph, self.pool, stream, capture_error_mode="thread_local"):
                out = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay


class GraphedForward:
    """A packed forward whose small passes are graphs: one for each size of row and of blocks of attention, so
    no more than there are sizes of both. Passes with images, shared prefixes or tokens that nobody looks at
    run as before.
    """

    is_packed = True

    def __init__(self, forward: PackedForward, capture: Capture | None = None) -> None:
        """`capture` is for tests."""
        self.forward = forward
        self.model = forward.model
        self.device = forward.device
        self.shares_prefixes = forward.shares_prefixes
        self._capture = capture or CudaCapture(forward.device)
        self._passes: dict[tuple[int, int], _FixedPass] = {}
        self._is_off = False
        self._lock = threading.Lock()

    def __call__(
        self,
        input_ids: Ragged,
        key_lengths: Lengths | None = None,
        first_lengths: Lengths | None = None,
        segments: Segments | None = None,
        images: SeenRow | None = None,
    ) -> torch.Tensor:
        is_plain = key_lengths is None and segments is None and images is None
        lengths = input_ids.lengths[input_ids.lengths > 0]
        size = choose_size(lengths) if is_plain and not self._is_off else None
        if size is None:
            return self.forward(input_ids, key_lengths, first_lengths, segments, images)
        rows = self.forward.rows(input_ids, first_lengths)
        with self._lock:
            known = self._passes.get(size)
            if known is not None:
                return known(rows, lengths.tolist())
            expected = self.forward(input_ids, first_lengths=first_lengths)
            if not self._is_off:
                self._add(size, rows, lengths.tolist(), expected)
            return expected

    def padding(self, lengths: Lengths) -> int:
        size = None if self._is_off else choose_size(lengths[lengths > 0])
        return 0 if size is None else size[0] - int(lengths.sum())

    def _add(
        self,
        size: tuple[int, int],
        rows: dict[str, torch.Tensor],
        lengths: Sequence[int],
        expected: torch.Tensor,
    ) -> None:
        """Captures a graph, if it gives what is expected [t, h]; else there are none from now on."""
        try:
            new = _FixedPass(self.forward, size[0], rows, lengths, self._capture)
            error = relative_error(new(rows, lengths).float(), expected.float())
            fault = f"relative error {error:.2g}"
        except Exception as problem:  # torch, triton and the driver have errors of their own
            error, fault = float("inf"), f"{type(problem).__name__}: {problem}"
        if error <= tolerance(self.model):
            self._passes[size] = new
            return
        logger.warning(
            "no CUDA graphs, for one of %d tokens failed (%s): passes run as before", size[0], fault
        )
        self._is_off = True
        self._passes.clear()


class _FixedPass:
    """One graph and the tensors that it reads."""

    def __init__(
        self,
        forward: PackedForward,
        n_tokens: int,
        rows: dict[str, torch.Tensor],
        lengths: Sequence[int],
        capture: Capture,
    ) -> None:
        plans = FixedPlans(n_tokens)
        plans.fill(lengths)
        # Every table of embeddings has a row 0.
        inputs = {name: row.new_zeros(1, n_tokens) for name, row in rows.items()}
        self.plans, self.inputs = plans, inputs
        self.replay = capture(lambda: forward.run([n_tokens], plans=plans, **inputs))

    def __call__(self, rows: dict[str, torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
        """hidden [t, h] of rows [1, t], nobody else's."""
        self.plans.fill(lengths)
        for name, row in rows.items():
            self.inputs[name].copy_(F.pad(row, (0, self.plans.n_tokens - row.shape[1])))
        return self.replay()[: sum(lengths)].clone()


def choose_size(lengths: Lengths) -> tuple[int, int] | None:
    """Tokens of the row and queries of a block of attention for sequences of `lengths`, none of them empty;
    None where there are too many tokens, or too many very short sequences.
    """
    total = int(lengths.sum())
    n_tokens = next((size for size in _SIZES if 0 < total <= size), None)
    if n_tokens is None:
        return None
    # Of layers with smaller blocks at most this is the larger of two, which tells them apart as well.
    block = choose_block(lengths, max(BLOCKS))
    return None if count_blocks(lengths, block) > most_blocks(n_tokens, block) else (n_tokens, block)
