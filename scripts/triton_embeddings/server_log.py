"""What the server's log tells a person."""

from __future__ import annotations

import re
import signal
from pathlib import Path

_LOAD_ERROR = re.compile(r"failed to load '(?P<entry>[^']+)' version \d+: (?P<status>[^:]+): (?P<text>.*)")
_LOADING = re.compile(r'"loading: (?P<entry>.+):\d+"')
_LOADED = re.compile(r"successfully loaded '(?P<entry>[^']+)'")
_MISSING_STEP = re.compile(
    r"ensemble '?(?P<model>[^' ]+)'? (?P<text>contains models that are not available.*)"
)


def explain_exit(name: str, exit_code: int, log: Path) -> str:
    """Why a child ended: of a server that gave up, the model that could not be loaded, if its log tells of
    one.
    """
    was_killed = exit_code < 0
    if name == "tritonserver" and log.is_file() and not was_killed:
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            found = _LOAD_ERROR.search(line)
            if found:
                model = found["entry"].rsplit(".", 1)[0]
                cause = _first_line(found["text"])
                if "KIND_GPU" in cause or "GPU" in cause:
                    cause += "; --device auto or cpu serves it without"
                return f"the model {model} cannot be loaded: {cause} (the server's log: {log})"
            missing = _MISSING_STEP.search(line)
            if missing:
                model = missing["model"]
                return (
                    f"the model {model} is not whole: {missing['text'].strip()}; write it anew with "
                    f"triton-embeddings add (the server's log: {log})"
                )
    how = f"was killed by {_signal(-exit_code)}" if was_killed else f"ended with exit code {exit_code}"
    return f"{name} {how} (the server's log: {log})"


def unloaded(log: Path) -> list[str]:
    """The entries that the server has begun to load, and neither loaded nor given up."""
    entries: dict[str, None] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []:
        if found := _LOADING.search(line):
            entries[found["entry"]] = None
        elif found := _LOADED.search(line) or _LOAD_ERROR.search(line):
            entries.pop(found["entry"], None)
    return list(entries)


def _signal(number: int) -> str:
    """Its name, and what sends it where no person did."""
    name = next((one.name for one in signal.Signals if one == number), f"signal {number}")
    return f"{name}, as the system does where memory runs out" if number == signal.SIGKILL else name


def _first_line(text: str) -> str:
    """The message inside a log line: the server escapes it, and puts the exception's class and place
    around it.
    """
    first = text.strip().rstrip('"').split("\\n")[0].replace('\\"', '"')
    return first.removeprefix("TritonModelException: ")
