"""The exact GELU on a CPU, in blocks of few sizes.

oneDNN's is about twice as fast as torch's own (2048 x 1536: 1.4 and 2.5 ms, 2 cores, AVX2), but it is
compiled anew for every number of rows, 0.25 MB each, which stay between the large tensors of the passes: the
holes around them are of use to nobody, and the process grew by 35 MB a minute. In blocks it is as fast.

*Source:* torch 2.13, ATen/native/Activation.cpp, which asks oneDNN for contiguous tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Rows of one block. What is left is cut into powers of two.
_ROWS = 256
# So many rows, and multiples of them up to a block, are not cut: short passes are filled up to such
# (backends/forward.py), and a second block takes 0.03 ms more.
_STEP = 8

# The operator itself: to find it by its name takes as long as to compute a few rows.
_gelu_out = torch.ops.aten.gelu.out


def blockwise_gelu(x: torch.Tensor) -> torch.Tensor:
    """x [..., f] -> [..., f], as torch.nn.functional.gelu."""
    if not x.is_contiguous():
        return F.gelu(x)
    rows = x.view(-1, x.shape[-1])
    if len(rows) <= _ROWS and len(rows) % _STEP == 0:
        return F.gelu(rows).view(x.shape)
    out = torch.empty_like(rows)
    start = 0
    while (left := len(rows) - start) > 0:
        stop = start + min(_ROWS, 1 << (left.bit_length() - 1))
        _gelu_out(rows[start:stop], out=out[start:stop])
        start = stop
    return out.view(x.shape)


class BlockwiseGelu(torch.nn.Module):
    """In place of a model's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return blockwise_gelu(x)
