"""What is looked at before anything is started. Raises CommandError."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gateway.settings import Settings
from triton_embeddings.errors import CommandError


def check_packages() -> None:
    """Raises CommandError when another package of the same name hides one of ours."""
    spec = importlib.util.find_spec("kernels")
    places = list(spec.submodule_search_locations or []) if spec else []
    if not any((Path(place) / "packed_attention.py").is_file() for place in places):
        raise CommandError(
            "the package `kernels` of Hugging Face is installed and hides this project's own; "
            "take it away with: pip uninstall kernels"
        )


def check_paths(*paths: Path) -> None:
    """Raises CommandError for a path that the Python backend would cut at a blank: it starts its
    processes by a shell.
    """
    for path in paths:
        if any(character.isspace() for character in str(path.resolve())):
            raise CommandError(
                f"tritonserver cannot work in {path.resolve()}: move it to a path without blanks"
            )


def read_gateway_settings(flags: Mapping[str, Any]) -> Settings:
    """What the gateway will read, looked at before anything is started.

    `flags` stand on the command line, and win over the environment.
    """
    try:
        return Settings(**flags)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        where = (
            f"--{name.replace('_', '-')}" if name in flags else f"the environment's GATEWAY_{name.upper()}"
        )
        reason = first["msg"].removeprefix("Value error, ")
        raise CommandError(f"{where} is {first['input']!r}: {reason[:1].lower()}{reason[1:]}") from error
