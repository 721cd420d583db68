"""What every test may use."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.support import fake_pb_utils
from tests.support.figures import pytest_runtest_makereport, pytest_terminal_summary  # noqa: F401 (hooks)

# The stages import the module that the server brings; this must be in place before any of them is imported.
sys.modules.setdefault("triton_python_backend_utils", fake_pb_utils)

# transformers copies a checkpoint's own code there, and stages keep what they know of transformers: otherwise
# in folders of the person who runs the tests.
for folder in ("MODULES", "ASSETS"):
    os.environ.setdefault(
        f"HF_{folder}_CACHE", str(Path(tempfile.gettempdir()) / f"triton-embeddings-tests-{folder.lower()}")
    )

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """One thread computes: two processes of tests with two threads each, which wait for one another on two
    cores, take twice as long (300 tests of families and heads: 100 s, 48 s with this).
    """
    torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)  # pytest's own order, by fixtures that tests share, comes before
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first, so that the processes that share the files end together."""
    items.sort(key=lambda item: (ROOT / "tests" / "server" not in item.path.parents, item.path))
