"""A pipeline without a server: tokenizer, encoder and head called one after the other."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from backends.checkpoint import Checkpoint
from backends.contract import DENSE, PROMPT_LENGTH
from backends.families import family_of
from backends.forward import Forward, choose_forward, encode
from backends.heads import HEADS
from backends.ragged import Ragged
from backends.tokenization import TextTokenizer, TokenizerSettings

CPU = torch.device("cpu")


def load_forward(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Forward:
    family = family_of(checkpoint)
    return choose_forward(
        lambda attention: family.load(checkpoint, attention, dtype, CPU, trust_remote_code=False),
        family,
        dict(checkpoint.config),
        "test",
    )


def embed(
    path: Path,
    texts: list[str],
    parameters: dict[str, Any] | None = None,
    max_batch_tokens: int = 16384,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """Dense embeddings [n, d] of texts, by the same code that the stages run."""
    checkpoint = Checkpoint.read(path)
    tokenizer = TextTokenizer(checkpoint, family_of(checkpoint).max_length(checkpoint))
    settings = TokenizerSettings.read(parameters or {}, checkpoint, "right")
    rows = tokenizer.encode([text.encode() for text in texts], settings)
    ids = Ragged.pack([torch.from_numpy(row.ids.astype(np.int64)) for row in rows])
    with torch.inference_mode():
        hidden = encode(load_forward(checkpoint, dtype), ids, max_batch_tokens, torch.float32)
        spec = HEADS["dense"]
        extra = {}
        if PROMPT_LENGTH in spec.inputs(checkpoint):
            extra[PROMPT_LENGTH] = torch.tensor([row.prompt_length for row in rows])
        head = spec.load(checkpoint, CPU)
        chosen = {name: value for name, value in (parameters or {}).items() if name in spec.parameters}
        head.check(chosen)
        return head(Ragged(hidden, ids.lengths), extra, chosen)[DENSE].numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n] cosines of the rows of two matrices."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
