"""What is read off a decoder's last token: labels of a classifier, or words of the vocabulary.

Only the rows of the language model's head that are needed are read and computed; the difference of two logits
is one product with the difference of their rows. Computed in float32.

*Source:* transformers 5.23 GenericForSequenceClassification; sentence-transformers 6.2 LogitScore.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backends import layers
from backends.checkpoint import Checkpoint
from backends.conversion import EMBEDDINGS
from backends.errors import CheckpointError
from backends.head_weights import HeadWeights
from backends.ragged import Ragged
from backends.rerank_prompt import RerankPrompt, Word, has_both_words
from backends.tokenizer_file import load_tokenizer
from backends.weights import read_rows, tensor_names
from kernels.transfer import to_device

DECODERS = ("gemma", "llama", "mistral", "qwen2", "qwen3")
"""Values of config.json's model_type whose classifier is a `score` over the last token."""
_HEADS = ("lm_head.weight",)
# Classes of transformers whose config.json need not say that the two are one.
_TIED = ("gemma",)


class LastTokenHead(torch.nn.Module):
    """hidden [t, h] in any format -> float32 logits [n, labels] of the last token of each sequence."""

    def __init__(self, output: torch.nn.Module) -> None:
        super().__init__()
        self.output = output

    def forward(self, hidden: Ragged) -> torch.Tensor:
        rows = to_device(hidden.offsets[1:] - 1, hidden.values.device)
        logits: torch.Tensor = self.output(hidden.values[rows].float())
        return logits


def load_words(checkpoint: Checkpoint, prompt: RerankPrompt, device: torch.device) -> LastTokenHead:
    """The logit of the prompt's true word, less that of the false one. Raises CheckpointError."""
    ids = [_id_of(checkpoint, word) for word in (prompt.true, prompt.false) if word is not None]
    folder = checkpoint.transformer_path
    is_tied = checkpoint.config.get("tie_word_embeddings", checkpoint.model_type in _TIED)
    known = tensor_names(folder)
    # Some checkpoints that tie nothing lack the head all the same.
    names = (*EMBEDDINGS, *_HEADS) if is_tied else (*_HEADS, *EMBEDDINGS)
    name = next((name for name in names if name in known), None)
    if name is None:
        raise CheckpointError(f"{folder} lacks {_HEADS[0]}, a weight of its language model's head")
    rows = read_rows(folder, name, ids).float()
    weight = rows[:1] - rows[1:2] if len(ids) > 1 else rows
    return _head(weight, None, device)


def load_labels(
    checkpoint: Checkpoint, n_labels: int, prompt: RerankPrompt | None, device: torch.device
) -> LastTokenHead:
    """A sequence classifier's labels; of one whose two labels are the prompt's words their difference.

    Raises CheckpointError when the weights are missing, or have other labels than told.
    """
    names = ["score.weight", "score.bias"]
    weights = HeadWeights(checkpoint, "classification head", names, device, torch.float32)
    weight, bias = weights.take("score.weight"), weights.found.get("score.bias")
    if prompt is not None and has_both_words(checkpoint, prompt) and len(weight) == 2:
        weight = weight[1:] - weight[:1]
        bias = None if bias is None else bias[1:] - bias[:1]
    if len(weight) != n_labels:
        raise CheckpointError(
            f"{weights.folder}: the classification head has {len(weight)} labels, but config.json tells of "
            f"{n_labels} (two where it has neither num_labels nor id2label); give it the right id2label"
        )
    return _head(weight, bias, device)


def _head(weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device) -> LastTokenHead:
    output = layers.linear(weight.to(device), None if bias is None else bias.to(device))
    return LastTokenHead(output).eval().requires_grad_(False)


def _id_of(checkpoint: Checkpoint, word: Word) -> int:
    if isinstance(word, int):
        return word
    tokenizer = load_tokenizer(checkpoint)
    own = tokenizer.token_to_id(word)
    ids: Sequence[int] = [own] if own is not None else tokenizer.encode(word, add_special_tokens=False).ids
    if not ids:
        raise CheckpointError(f"{checkpoint.transformer_path}: the tokenizer has no token for {word!r}")
    return ids[0]
