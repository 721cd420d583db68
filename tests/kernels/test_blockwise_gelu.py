import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from kernels.blockwise_gelu import BlockwiseGelu, blockwise_gelu


@pytest.mark.parametrize(
    "shape", [(0, 8), (1, 8), (1, 37, 24), (2, 3, 5), (600, 16), (512, 8), (8,), (24, 8), (1, 256, 4)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch(shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype) * 3
    before = x.clone()
    torch.testing.assert_close(blockwise_gelu(x), F.gelu(x), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(BlockwiseGelu()(x), F.gelu(x), atol=2e-6, rtol=1e-5)
    assert torch.equal(x, before)
    if dtype == torch.float32 and len(x):
        wrong = F.gelu(x, approximate="tanh")
        assert (blockwise_gelu(x) - wrong).abs().max() > 2e-5, "the comparison must see another GELU"


def test_takes_what_is_not_contiguous():
    x = torch.randn(6, 40)
    for view in (x.t(), x[:, :20], x[:, 20:].t()):
        torch.testing.assert_close(blockwise_gelu(view), F.gelu(view))


def test_few_shapes_are_compiled():
    """oneDNN tells of each that it compiles."""
    code = """
import torch
from kernels.blockwise_gelu import blockwise_gelu
for rows in [*range(1, 300, {step}), 512, 600, 900]:
    {function}(torch.randn(rows, 64))
    {function}(torch.randn(1, rows, 64))
"""

    def compiled(function, step):
        done = subprocess.run(
            [sys.executable, "-c", code.format(function=function, step=step)],
            env={**os.environ, "ONEDNN_VERBOSE": "2"},
            capture_output=True,
            text=True,
            check=True,
        )
        return sum("create:cache_miss" in line for line in done.stdout.splitlines())

    assert compiled("torch.nn.functional.gelu", 3) > 100, "else this shows nothing"
    multiples_of_eight, smaller_powers_of_two = 32, 3
    assert compiled("blockwise_gelu", 1) == multiples_of_eight + smaller_powers_of_two
