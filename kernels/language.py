"""The language that kernels are written in, and how one is launched.

A CUDA build of torch brings triton, a CPU build does not: there the modules import all the same and their
torch references work, and only a launch is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["check_rows", "jit", "launch", "offsets_of", "power_of_two", "tl"]

try:
    import triton.language as tl
    from triton import jit
    from triton.runtime.interpreter import InterpretedFunction
except ImportError:
    tl = None
    InterpretedFunction = None

    def jit(kernel: Any = None, **options: Any) -> Any:
        """Leaves a kernel the plain function that it is."""
        return jit if kernel is None else kernel


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Runs `programs` programs of a kernel on the device of its tensors; nothing waits for the result.

    Raises RuntimeError without triton or a GPU, ValueError for tensors of several devices.
    """
    devices = {argument.device for argument in arguments if isinstance(argument, torch.Tensor)}
    if len(devices) != 1:
        raise ValueError(
            f"the tensors of a kernel are on {', '.join(sorted(map(str, devices)))}, not on one device"
        )
    (device,) = devices
    is_interpreted = InterpretedFunction is not None and isinstance(kernel, InterpretedFunction)
    if tl is None or not (device.type == "cuda" or is_interpreted):
        missing = "triton, which is not installed" if tl is None else f"a GPU; its tensors are on {device}"
        raise RuntimeError(f"this kernel needs {missing}; the torch reference beside it runs anywhere")
    if programs:
        # A kernel is launched on the current device, wherever its tensors are.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[(programs,)](*arguments, **options)


def check_rows(**tensors: torch.Tensor) -> None:
    """Raises ValueError unless each is [t, h], floating-point, the numbers of a row side by side."""
    for name, x in tensors.items():
        if x.ndim != 2 or x.stride(1) != 1 or not x.dtype.is_floating_point:
            raise ValueError(
                f"{name}: {x.dtype} {list(x.shape)}; a kernel takes rows [t, h] of numbers side by side"
            )


def offsets_of(lengths: Sequence[int], total: int) -> npt.NDArray[np.int32]:
    """[n] lengths of segments end to end -> [n + 1] where each begins. Raises ValueError unless they make
    `total`.
    """
    counts = np.asarray(lengths, np.int64)
    if (counts < 0).any() or int(counts.sum()) != total:
        raise ValueError(
            f"lengths add up to {int(counts.sum())} (none may be negative), but there are {total} rows"
        )
    return np.concatenate([np.zeros(1, np.int32), np.cumsum(counts).astype(np.int32)])


def power_of_two(number: int, least: int = 1) -> int:
    """The next one up: the only sizes that blocks have."""
    return max(least, 1 << max(number - 1, 0).bit_length())
