"""Keeps on disk what transformers finds out about its own files whenever it is imported.

To learn which names its files define it reads all of them, about 1 700, and once more when the first model is
imported: 1.2 s of the 5 s that an encoder's process takes for its imports (2 cores). Only another version
says otherwise, so the answer is written to where libraries keep such things beside the Hub's own cache.

*Source:* transformers 5.23, utils/import_utils.py, `create_import_structure_from_path`. If a version has no
such function, or the folder cannot be written to, all goes on as without this.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from backends.import_hooks import after_import

_MODULE = "transformers.utils.import_utils"
_FUNCTION = "create_import_structure_from_path"

logger = logging.getLogger(__name__)

Structure = dict[Any, Any]
"""Folders, files and the packages that they need (str or frozenset of str), nested -> names (set of str)."""
Read = Callable[[Any], Structure]


def install() -> None:
    """From now on a first import of transformers uses the cache."""
    after_import(_MODULE, _use_cache)


def _use_cache(module: ModuleType) -> None:
    read = getattr(module, _FUNCTION, None)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("transformers")
        if read is not None:
            setattr(module, _FUNCTION, keep(read, version))


def keep(read: Read, version: str) -> Read:
    """The same function, which has what it says of the folder of all models from the cache."""

    @cache
    def all_models(folder: Path) -> Structure:
        file = _file(folder, version)
        try:
            if structure := _decoded(json.loads(file.read_bytes())):
                return structure
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            logger.warning("%s cannot be used (%s); it is made anew", file, error)
        structure = read(folder)
        try:
            _write(file, json.dumps(_encoded(structure)))
        except OSError as error:
            logger.info("transformers is imported more slowly than it could be: %s", error)
        return structure

    def read_or_remember(path: Any) -> Structure:
        given = Path(path)
        folder = given.parent if given.is_file() else given
        # A version under development changes without another number.
        is_all = folder.name == "models" and folder.parent.name == "transformers" and "dev" not in version
        return all_models(folder) if is_all else read(path)

    return read_or_remember


def _file(folder: Path, version: str) -> Path:
    # transformers has imported it by now.
    from huggingface_hub import constants

    # The folder's time tells of a model that somebody adds to it.
    key = f"{folder} {folder.stat().st_mtime_ns}"
    name = f"transformers-{version}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    return Path(constants.HF_ASSETS_CACHE) / "triton-embeddings" / name


def _write(file: Path, text: str) -> None:
    """At once: several processes may write it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    stream = tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False)  # noqa: SIM115 (it is renamed)
    written = Path(stream.name)
    try:
        with stream:
            stream.write(text)
        written.chmod(0o644)
        written.replace(file)
    except OSError:
        written.unlink(missing_ok=True)
        raise


def _encoded(structure: Structure) -> list[Any]:
    return [
        [
            key if isinstance(key, str) else sorted(key),
            _encoded(value) if isinstance(value, dict) else {"names": sorted(value)},
        ]
        for key, value in structure.items()
    ]


def _decoded(rows: list[Any]) -> Structure:
    return {
        key if isinstance(key, str) else frozenset(key): (
            set(value["names"]) if isinstance(value, dict) else _decoded(value)
        )
        for key, value in rows
    }
