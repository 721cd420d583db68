"""Where there is no GPU the kernels run in triton's interpreter, which is chosen when triton is imported."""

import importlib
import importlib.util
import os
import sys

import numpy as np
import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter (3.9) multiplies matrices of bfloat16 as whole numbers, and cuts off what it should round.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16


def interpret_kernels() -> None:
    """Also where another test has imported triton or kernels before. The environment, which processes of
    other tests inherit, is left as it was.
    """
    for name in list(sys.modules):
        # What is compiled cannot be loaded twice, and does not depend on the choice.
        if name.split(".")[0] == "triton" and not name.startswith("triton._C"):
            del sys.modules[name]
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        knobs = importlib.import_module("triton").knobs
    finally:
        del os.environ["TRITON_INTERPRET"]
    knobs.propagate_env = False
    knobs.runtime.interpret = True
    loaded = [module for name, module in sys.modules.items() if name.startswith("kernels.")]
    # The language first, which the others take triton from.
    for module in sorted(loaded, key=lambda module: module.__name__ != "kernels.language"):
        if hasattr(module, "tl"):
            importlib.reload(module)


if DEVICE.type == "cpu":
    interpret_kernels()


@pytest.fixture(autouse=True)
def _interpreted():
    """A GPU says nothing when an exponential is infinite, where the interpreter's numpy warns; and threads
    that wait for each other take longer than these small tensors.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with np.errstate(all="ignore"):
        yield
    torch.set_num_threads(threads)
