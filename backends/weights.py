"""Tensors by name out of a checkpoint's weight files, without the rest of the model."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import safetensors
import torch

from backends.errors import CheckpointError
from backends.json_file import read_json
from backends.weight_files import WEIGHTS

_BROKEN = (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError)


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """The named tensors that a file, or a folder with a model's weights, has; all of a file without names.

    Raises CheckpointError for a file that cannot be read.
    """
    files = [path] if path.is_file() else _files(path, names)
    found: dict[str, torch.Tensor] = {}
    wanted = None if names is None else set(names)
    for file in files:
        try:
            found.update(_read(file, wanted))
        except _BROKEN as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    return found


def tensor_names(folder: Path) -> frozenset[str]:
    """The names of all tensors of a model, without their numbers. Raises CheckpointError."""
    names: set[str] = set()
    for file in _files(folder, None):
        try:
            if file.suffix == ".safetensors":
                with safetensors.safe_open(file, framework="pt") as tensors:
                    names.update(tensors.keys())
            else:
                names.update(_load_pickle(file))
        except _BROKEN as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    return frozenset(names)


def read_rows(folder: Path, name: str, rows: Sequence[int]) -> torch.Tensor:
    """Some rows [n, ...] of a tensor, without reading the rest. Raises CheckpointError."""
    for file in _files(folder, [name]):
        try:
            if file.suffix == ".safetensors":
                with safetensors.safe_open(file, framework="pt") as tensors:
                    if name not in tensors.keys():  # noqa: SIM118  # it has no __contains__
                        continue
                    whole = tensors.get_slice(name)
                    size = whole.get_shape()[0]
                    _check_rows(file, name, rows, size)
                    return torch.cat([whole[row : row + 1] for row in rows])
            content = _load_pickle(file)
            if name in content:
                _check_rows(file, name, rows, content[name].shape[0])
                return content[name][list(rows)].clone()
        except _BROKEN as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    raise CheckpointError(f"{folder} lacks {name}")


def _check_rows(file: Path, name: str, rows: Sequence[int], size: int) -> None:
    over = [row for row in rows if not 0 <= row < size]
    if over:
        raise CheckpointError(f"{file}: {name} has {size} rows, and none for the token {over[0]}")


def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
    # weights_only keeps it from running code. Those of torch before 1.6 are no zip files.
    content: dict[str, torch.Tensor] = torch.load(
        file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
    )
    return content


def _read(file: Path, wanted: set[str] | None) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        with safetensors.safe_open(file, framework="pt") as tensors:
            names = tensors.keys() if wanted is None else wanted & set(tensors.keys())
            return {name: tensors.get_tensor(name) for name in names}
    return {name: value for name, value in _load_pickle(file).items() if wanted is None or name in wanted}


def _files(folder: Path, names: Iterable[str] | None) -> list[Path]:
    """The files of a model's weights that hold some of the names."""
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} has no weights; one of {', '.join(WEIGHTS)} belongs there")
    if not found.name.endswith(".index.json"):
        return [found]
    places: dict[str, str] = read_json(found).get("weight_map") or {}
    wanted = places if names is None else names
    return [folder / shard for shard in dict.fromkeys(places[name] for name in wanted if name in places)]


def linear_from(weights: dict[str, torch.Tensor], device: torch.device) -> torch.nn.Linear:
    """A linear layer in float32 of its weight [out, in] and, where there is one, its bias."""
    if "weight" not in weights:
        raise CheckpointError(
            "a projection has no tensor `weight`, or for Stanford's ColBERT no `linear.weight`"
        )
    size_out, size_in = weights["weight"].shape
    layer = torch.nn.Linear(size_in, size_out, bias="bias" in weights, device="meta")
    layer.load_state_dict(weights, assign=True)
    return layer.float().to(device).eval().requires_grad_(False)
