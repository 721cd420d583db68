import numpy as np
import pytest
import torch

from kernels.transfer import to_device
from tests.kernels.conftest import DEVICE


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.float32])
def test_numbers_arrive_in_their_format(kind):
    numbers = np.arange(7, dtype=kind)[::2].copy()
    for given in (numbers, torch.from_numpy(numbers)):
        got = to_device(given, DEVICE)
        assert got.device.type == DEVICE.type
        np.testing.assert_array_equal(got.cpu().numpy(), numbers, strict=True)


def test_what_is_there_already_is_not_copied():
    there = torch.arange(3, device=DEVICE)
    assert to_device(there, there.device) is there
