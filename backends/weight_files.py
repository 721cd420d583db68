"""Which files hold a model's weights, and whether they are whole, without reading a tensor."""

from __future__ import annotations

import json
from pathlib import Path

from backends.errors import CheckpointError
from backends.json_file import read_json

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_LFS_POINTER = b"version https://git-lfs"


def check_weights(folder: Path) -> None:
    """Finds what a broken download leaves behind, by the files' headers. Raises CheckpointError."""
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{folder} has no weights; one of {', '.join(WEIGHTS)} belongs there. A download that was cut "
            "short looks like this"
        )
    files = {found}
    if found.name.endswith(".index.json"):
        shards = set((read_json(found).get("weight_map") or {}).values())
        if any(Path(str(name)).name != name for name in shards):
            raise CheckpointError(f"{found} names a file outside its folder")
        files = {folder / str(name) for name in shards}
        missing = sorted(file.name for file in files if not file.is_file())
        if missing or not files:
            raise CheckpointError(
                f"{found} names {len(missing)} files that are not there: {', '.join(missing[:3])}"
            )
    for file in sorted(files):
        _check_weight_file(file)


def _check_weight_file(file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise CheckpointError(f"{file} is a git-lfs pointer, not the weights; run: git lfs pull")
        if file.suffix != ".safetensors":
            return
        # A safetensors file: the header's length in 8 bytes, the header in JSON, the numbers.
        length = int.from_bytes(start[:8], "little")
        stream.seek(8)
        try:
            header = json.loads(stream.read(length)) if 0 < length <= size - 8 else None
        except (json.JSONDecodeError, UnicodeDecodeError):
            header = None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is not a safetensors file, or was cut short ({size} bytes)")
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    ends = [entry["data_offsets"][1] for entry in entries if isinstance(entry, dict)]
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise CheckpointError(
            f"{file} has {size} bytes, but its header tells of {expected}: download it again"
        )
