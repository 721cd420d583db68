import random

import numpy as np
import pytest
import torch

from backends.ragged import Ragged
from backends.sentence_modules import Pooling
from kernels.segment_pooling import MODES, pool, pool_reference
from tests.kernels.conftest import DEVICE, HALF

LENGTHS = [37, 1, 5]
SKIPPED = [3, 2, 4]


def close(got, expected):
    """Float32 sums in another order; the answer is float32 whatever comes in."""
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected.double(), atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_modes(mode, dtype):
    torch.manual_seed(0)
    hidden = torch.randn(sum(LENGTHS), 70, device=DEVICE).to(dtype)
    close(pool(hidden, LENGTHS, mode), pool_reference(hidden.double(), LENGTHS, mode))
    expected = pool_reference(hidden.double(), LENGTHS, mode, skipped=SKIPPED, normalizes=True)
    got = pool(hidden, LENGTHS, mode, skipped=SKIPPED, normalizes=True)
    close(got, expected)
    other = pool_reference(hidden, LENGTHS, mode, normalizes=True)
    assert mode == "lasttoken" or (got - other).abs().max() > 0.01, "prompts that are not skipped must show"
    shifted = pool_reference(hidden, [36, 2, 5], mode)
    assert (pool(hidden, LENGTHS, mode) - shifted).abs().max() > 0.01, "a lost boundary must show"


@pytest.mark.parametrize("mode", MODES)
def test_the_reference_is_the_pooling_of_the_dense_head(mode):
    torch.manual_seed(0)
    hidden = torch.randn(sum(LENGTHS), 9)
    expected = Pooling([mode])(Ragged(hidden, np.array(LENGTHS)), torch.tensor(SKIPPED))
    torch.testing.assert_close(pool_reference(hidden, LENGTHS, mode, skipped=SKIPPED), expected)


def test_random_batches_of_rows_that_lie_apart():
    generator = random.Random(4)
    torch.manual_seed(4)
    for _ in range(8):
        lengths = [generator.choice([1, 2, 31, 32, 33]) for _ in range(generator.randint(0, 3))]
        size = generator.choice([1, 63, 64, 65])
        hidden = torch.randn(sum(lengths), size + 3, device=DEVICE)[:, 1 : size + 1]
        given = {
            "skipped": [generator.randint(0, n) for n in lengths],
            "normalizes": generator.random() < 0.5,
        }
        mode = generator.choice(MODES)
        close(pool(hidden, lengths, mode, **given), pool_reference(hidden, lengths, mode, **given))


def test_nothing_has_no_direction():
    hidden = torch.zeros(2, 4, device=DEVICE)
    assert pool(hidden, [2], "mean", normalizes=True).tolist() == [[0, 0, 0, 0]]


def test_refusals():
    hidden = torch.randn(4, 8, device=DEVICE)
    for given, reason in [
        ((hidden, [4, 0], "mean"), "without tokens"),
        ((hidden, [3], "mean"), "there are 4 rows"),
        ((hidden, [4], "median"), "unknown pooling mode 'median'"),
        ((hidden[None], [4], "mean"), "takes rows"),
        ((hidden.t(), [8], "mean"), "side by side"),
    ]:
        with pytest.raises(ValueError, match=reason):
            pool(*given)
    with pytest.raises(ValueError, match="for 1 sequences"):
        pool(hidden, [4], "mean", skipped=[1, 2])
