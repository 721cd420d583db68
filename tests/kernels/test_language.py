import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from kernels import language
from tests.conftest import ROOT
from tests.kernels.conftest import DEVICE

MODULES = sorted(
    f"kernels.{file.stem}" for file in (ROOT / "kernels").glob("*.py") if file.stem != "__init__"
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.strip()


def test_without_triton_the_references_work_and_a_launch_is_refused():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        f"import {', '.join(MODULES)}\n"
        "import torch; from kernels.attention_plan import *; from kernels.varlen_attention import *\n"
        "x = torch.ones(3, 1, 16); print(varlen_attention_reference(x, x, x, [3]).sum().item())\n"
        "try: varlen_attention(x, x, x, make_plan([3], device=x.device))\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert run(code).splitlines() == [
        "48.0",
        "this kernel needs triton, which is not installed; the torch reference beside it runs anywhere",
    ]


def test_kernels_that_were_imported_before_are_interpreted_too():
    if DEVICE.type != "cpu":
        pytest.skip("the kernels are compiled here")
    code = (
        "import sys, torch, kernels.packed_attention\n"
        "assert 'triton' not in sys.modules, 'for the attention of a CPU'\n"
        "from kernels.attention_plan import make_plan\n"
        "from kernels.varlen_attention import varlen_attention\n"
        "import os, tests.kernels.conftest\n"
        "x = torch.ones(3, 1, 16); plan = make_plan([3], device=x.device)\n"
        "print(varlen_attention(x, x, x, plan).sum().item(), 'TRITON_INTERPRET' in os.environ)\n"
    )
    assert run(code) == "48.0 False"
    assert "TRITON_INTERPRET" not in os.environ


def test_tensors_of_a_launch_are_on_one_device():
    with pytest.raises(ValueError, match="on cpu, meta, not on one device"):
        language.launch(None, 1, torch.ones(1), torch.ones(1, device="meta"))
    with pytest.raises(RuntimeError, match="needs a GPU; its tensors are on meta"):
        language.launch(None, 1, torch.ones(1, device="meta"))


def test_offsets_and_sizes_of_blocks():
    assert language.offsets_of([2, 0, 3], 5).tolist() == [0, 2, 2, 5]
    assert language.offsets_of([], 0).dtype == np.int32
    for lengths in ([2, 2], [6, -1]):
        with pytest.raises(ValueError, match="but there are 5 rows"):
            language.offsets_of(lengths, 5)
    assert [language.power_of_two(n) for n in (0, 1, 2, 3, 72, 128)] == [1, 1, 2, 4, 128, 128]
    assert language.power_of_two(3, least=16) == 16
