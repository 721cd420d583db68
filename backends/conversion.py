"""Whether a sequence classifier's weights are those of a language model's head for some words.

Read with numpy alone, from the few bytes that matter: this is asked where torch is not wanted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError
from backends.json_file import read_json
from backends.tokenizer_file import load_tokenizer

Rows = npt.NDArray[np.float32]

# Two vectors of a thousand numbers that have nothing to do with each other have a cosine of 0.1 at most; fine
# tuning changes a head by little.
_LEAST_COSINE = 0.5
EMBEDDINGS = ("model.embed_tokens.weight", "embed_tokens.weight")
"""What a decoder's checkpoint may call its word embeddings."""
_FORMATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def is_made_of_words(checkpoint: Checkpoint, true: str | int, false: str | int | None) -> bool:
    """Whether the classifier's one row is the word embedding of `true` less that of `false`, or its two rows
    are both of them, nearly: what a conversion of a model whose head is tied to its embeddings holds.
    """
    words = [false, true] if false is not None else [true]
    tokenizer = load_tokenizer(checkpoint)
    ids = [word if isinstance(word, int) else tokenizer.token_to_id(word) for word in words]
    known = [token for token in ids if token is not None]
    if len(known) < len(words):
        return False
    score = _read(checkpoint.transformer_path, "score.weight", None)
    rows = next(
        (
            found
            for name in EMBEDDINGS
            if (found := _read(checkpoint.transformer_path, name, known)) is not None
        ),
        None,
    )
    if score is None or rows is None or score.shape[-1] != rows.shape[-1]:
        return False
    expected = rows if len(score) == len(rows) else rows[-1:] - rows[:-1]
    if len(score) != len(expected):
        return False
    norms = np.linalg.norm(score, axis=1) * np.linalg.norm(expected, axis=1)
    return bool(((score * expected).sum(1) > _LEAST_COSINE * norms).all())


def _read(folder: Path, name: str, rows: Sequence[int] | None) -> Rows | None:
    """A matrix of a safetensors checkpoint, or some rows of it; None where there is no such matrix."""
    file = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if not file.is_file() and index.is_file():
        file = folder / str((read_json(index).get("weight_map") or {}).get(name, ""))
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(size)).get(name)
        if entry is None or len(entry["shape"]) != 2 or entry["dtype"] not in _FORMATS:
            return None
        kind, (count, width) = _FORMATS[entry["dtype"]], entry["shape"]
        wanted = range(count) if rows is None else rows
        if any(row >= count for row in wanted):
            raise CheckpointError(f"{file}: {name} has {count} rows, and none for the token {max(wanted)}")
        start = 8 + size + entry["data_offsets"][0]
        found = []
        for row in wanted:
            stream.seek(start + row * width * kind.itemsize)
            found.append(np.frombuffer(stream.read(width * kind.itemsize), kind))
    numbers = np.stack(found)
    if entry["dtype"] == "BF16":
        # The upper half of a float32.
        numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
    made: Rows = numbers.astype(np.float32)
    return made
