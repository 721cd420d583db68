"""Where a model runs, and in which number format."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch

from backends.options import WIRE_DTYPES
from kernels.half_linear import has_half_products

logger = logging.getLogger(__name__)

TORCH_DTYPES = {"FP32": torch.float32, "BF16": torch.bfloat16, "FP16": torch.float16}
"""By the server's name of the data type."""
# In the words of CUDA and Triton, of its libraries, and of torch on the CPU.
_SIGNS_OF_NO_MEMORY = ("out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory")
# Of torch's builds only those for CUDA bring triton.
_KERNEL_DEVICES = {"cuda"} if find_spec("triton") else set()


def place(device: str) -> torch.device:
    """cpu or cuda:N as the server says -> where this torch can run it."""
    if device != "cpu" and not torch.cuda.is_available():
        logger.warning(
            "the server offers %s, but torch %s has no CUDA: running on the CPU", device, torch.__version__
        )
        return torch.device("cpu")
    return torch.device(device)


def has_kernels(device: torch.device) -> bool:
    """Whether kernels in the Triton language run there; what they do is done by torch elsewhere."""
    return device.type in _KERNEL_DEVICES


def is_out_of_memory(error: Exception) -> bool:
    """Whether it says that there is no room for so much at once, on a GPU or off it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # Only torch's own allocator has a class of its own for it.
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_NO_MEMORY)


def free_memory(device: torch.device) -> None:
    """Gives back what torch keeps for later use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check(device: torch.device) -> None:
    """Raises what a GPU says to everything after a fault in a kernel, until the process ends."""
    if device.type == "cuda":
        torch.ones(1, device=device).item()


def compute_dtype(option: str, device: torch.device, quantization: str = "auto") -> torch.dtype:
    """auto: bfloat16 where the hardware multiplies it (AVX512-BF16, AMX, a GPU), else float32, as a quantized
    model's numbers always are.
    """
    if quantization not in ("auto", "none"):
        return torch.float32
    if option != "auto":
        return TORCH_DTYPES[WIRE_DTYPES[option]]
    return torch.bfloat16 if _has_bfloat16(device) else torch.float32


def weight_format(option: str, dtype_option: str, device: torch.device) -> str:
    """auto: float16 for weights of a model of which nobody says in what to compute, and which is computed in
    float32 on a CPU: half the memory, and short requests are faster. One of QUANTIZATIONS, but not auto.
    """
    if option != "auto":
        return option
    is_float32 = dtype_option == "auto" and compute_dtype("auto", device) is torch.float32
    return "float16" if is_float32 and device.type == "cpu" and has_half_products() else "none"


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Private names of torch, which has no public ones for these; a build without them computes in float32.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
