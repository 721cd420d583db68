"""Asks a library of .venv-oracle, in a process of its own."""

import json
import subprocess
from typing import Any

from tests.conftest import ROOT

PYTHON = ROOT / ".venv-oracle" / "bin" / "python"


def ask(oracle: str, **question: Any) -> Any:
    """The JSON answer of tests/oracles/<oracle>.py."""
    done = subprocess.run(
        [PYTHON, ROOT / "tests" / "oracles" / f"{oracle}.py"],
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
