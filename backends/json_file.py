"""Reads the small files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from backends.errors import CheckpointError


def read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """A file's JSON object; empty where there is no such file. Raises CheckpointError."""
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path.parent} has no {path.name}; is it the directory of a checkpoint?")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}; a JSON object belongs there")
    return content
