"""Checkpoints with the shapes of published models and random weights, which are as fast as trained ones.

They are written once, to build/perf.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recording import CACHE

from backends.ragged import Ragged
from tests.support import checkpoints
from tests.support.checkpoints import bert, bge_m3, classifier, qwen3, sentence_transformer, xlm_roberta


def bert_sizes(hidden: int, layers: int) -> dict[str, int]:
    """BERT's proportions: heads of 64 (MiniLM's of 32), four times the width between."""
    heads = hidden // 64 if hidden > 512 else hidden // 32
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }


def encoder(path: Path, max_length: int = 8192, **sizes: Any) -> Path:
    """BERT, mean-pooled."""
    return sentence_transformer(
        path,
        {"pooling_mode_mean_tokens": True},
        transformer={"max_seq_length": max_length},
        base=lambda folder: bert(folder, max_length, **sizes),
    )


def decoder(path: Path, max_length: int = 8192, **sizes: Any) -> Path:
    """Qwen3, of whose tokens the last one counts."""
    return sentence_transformer(
        path,
        {"pooling_mode_lasttoken": True},
        transformer={"max_seq_length": max_length},
        base=lambda folder: qwen3(folder, max_length=max_length, **sizes),
    )


def reranker(path: Path, max_length: int = 512, **sizes: Any) -> Path:
    """XLM-RoBERTa with one label."""
    return classifier(path, xlm_roberta, max_length=max_length, **sizes)


_XLM_R = {"vocab_size": 250002}
_BERT = {"vocab_size": 30522, "max_length": 512}
_QWEN3 = {"vocab_size": 151669, "head_dim": 128, "num_key_value_heads": 8}
SHAPES: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "tiny-bert": (encoder, {**bert_sizes(128, 2), "max_length": 512}),
    "tiny-qwen3": (decoder, {"hidden_size": 64, "num_hidden_layers": 2}),
    "tiny-m3": (bge_m3, {**bert_sizes(128, 2), "max_length": 8192}),
    "small-m3": (bge_m3, {**bert_sizes(384, 6), "max_length": 8192}),
    "tiny-reranker": (reranker, bert_sizes(128, 2)),
    "bge-base": (encoder, {**bert_sizes(768, 12), **_BERT}),
    "bge-large": (encoder, {**bert_sizes(1024, 24), **_BERT}),
    "bge-m3": (bge_m3, {**bert_sizes(1024, 24), **_XLM_R, "max_length": 8192}),
    "bge-reranker-base": (reranker, {**bert_sizes(768, 12), **_XLM_R}),
    "Qwen3-Embedding-0.6B": (
        decoder,
        {
            **_QWEN3,
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "intermediate_size": 3072,
        },
    ),
    "Qwen3-Embedding-8B": (
        decoder,
        {
            **_QWEN3,
            "hidden_size": 4096,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "intermediate_size": 12288,
        },
    ),
}
"""Name -> how it is made, and its sizes."""


def published(name: str) -> Path:
    """A checkpoint of SHAPES."""
    how, sizes = SHAPES[name]
    return make(name, how, **sizes)


def make(name: str, how: Callable[..., Path], **sizes: Any) -> Path:
    """The checkpoint, made where it is missing."""
    path = CACHE / name.replace(" ", "-")
    if not (path / "made").exists():
        print(f"making {name} in {path}")
        # Weights as transformers initialises them, in bfloat16: their values do not matter here, and 8
        # billion of float32 do not fit into most machines.
        randomize, dtype = checkpoints.randomize, torch.get_default_dtype()
        checkpoints.randomize = lambda network, seed=0: network.eval()
        torch.set_default_dtype(torch.bfloat16)
        try:
            how(path, **sizes)
        finally:
            checkpoints.randomize = randomize
            torch.set_default_dtype(dtype)
        (path / "made").touch()
    return path


def batch_of(lengths: Sequence[int] | np.ndarray[Any, Any], vocabulary: int = 100) -> Ragged:
    """Sequences of these lengths, of small token ids, which every vocabulary has."""
    generator = np.random.default_rng(0)
    counts = np.asarray(lengths, np.int64)
    return Ragged(torch.from_numpy(generator.integers(5, vocabulary, int(counts.sum()))), counts)
