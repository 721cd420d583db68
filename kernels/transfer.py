"""Copies from the host to a device that the host does not wait for."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch


def to_device(numbers: npt.NDArray[Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Numbers of the host, in their format. Where they are already on the device there is no copy."""
    table = numbers if isinstance(numbers, torch.Tensor) else torch.from_numpy(numbers)
    if device.type != "cuda" or table.device.type != "cpu":
        return table.to(device)
    # A copy from memory that is not pinned is waited for. torch keeps the pinned memory until it is done.
    return table.pin_memory().to(device, non_blocking=True)
