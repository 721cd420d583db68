"""Asks a library of .venv-oracle, in a process of its own."""

import json
import subprocess
from typing import Any

from tests.conftest import ROOT

PYTHON = ROOT / ".venv-oracle" / "bin" / "python"
# With the collector at work it takes a seventh longer to import what they import.
_RUN = "import gc, runpy, sys; gc.disable(); runpy.run_path(sys.argv[1], run_name='__main__')"


def ask(oracle: str, **question: Any) -> Any:
    """The JSON answer of tests/oracles/<oracle>.py."""
    done = subprocess.run(
        [PYTHON, "-c", _RUN, ROOT / "tests" / "oracles" / f"{oracle}.py"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Some libraries print on their own account.
    return json.loads(done.stdout.strip().splitlines()[-1])
