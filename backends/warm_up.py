"""Passes at load that compile every kernel that requests need: later each would cost one of them seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import numpy as np
import torch

from backends.forward import Forward, Segments
from backends.ragged import Ragged

# Lengths that choose each size of an attention's block (kernels/attention_plan.py), and one less: strides
# that are a multiple of 16 are compiled apart from those that are not.
_LENGTHS = (1, 15, 16, 31, 32, 63, 64, 127, 128)

logger = logging.getLogger(__name__)


def warm_up(forward: Forward, most_tokens: int) -> None:
    """Runs passes of all kinds, of sequences of at most `most_tokens`, and waits for the device."""
    begin = time.monotonic()
    with torch.inference_mode():
        for row, segments in passes(most_tokens, shares_prefixes=forward.shares_prefixes):
            # Any id that is no padding, and no image.
            ids = torch.ones(int(row.sum()), dtype=torch.int64, device=forward.device)
            forward(Ragged(ids, row), segments=segments)
    if forward.device.type == "cuda":
        torch.cuda.synchronize(forward.device)
    logger.info("compiled its kernels in %.1f s", time.monotonic() - begin)


def passes(
    most_tokens: int, *, shares_prefixes: bool
) -> Iterator[tuple[np.ndarray[tuple[int], np.dtype[np.int64]], Segments | None]]:
    """Lengths of the sequences of each pass, and what they go on from."""
    for length in _up_to(most_tokens):
        yield np.array([length]), None
    for length in _up_to(most_tokens // 2) if shares_prefixes else ():
        # The second goes on from the first.
        yield np.array([length, length]), Segments(np.array([0, length]), [(), ((0, length),)])


def _up_to(most: int) -> list[int]:
    return sorted({min(length, most) for length in _LENGTHS})
