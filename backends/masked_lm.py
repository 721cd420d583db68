"""The masked-language-model head of an encoder, without the encoder: hidden [t, h] -> logits [t, v].

dense, activation, norm, then the product with the word embeddings: every family does the same under other
names.

*Source:* transformers 5.23, the ForMaskedLM class of each architecture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from backends import layers
from backends.checkpoint import Checkpoint
from backends.head_weights import HeadWeights


@dataclass(frozen=True)
class Layout:
    """Names of the head's tensors in the checkpoint."""

    words: str
    """The word embeddings, which stand in where the decoder's own weight is not stored."""
    decoder: str
    dense: str | None = None
    norm: str | None = None
    bias: tuple[str, ...] = ()
    """Names under which the decoder's bias is stored."""
    activation: str = "hidden_act"
    """The entry of config.json, or with a leading "=" the activation itself."""
    norm_eps: str = "layer_norm_eps"

    @property
    def names(self) -> list[str]:
        """Everything that may be there."""
        parts = [f"{part}.{kind}" for part in (self.dense, self.norm) if part for kind in ("weight", "bias")]
        return [*parts, f"{self.decoder}.weight", self.words, *self.bias]


def _bert_like(prefix: str) -> Layout:
    return Layout(
        words=f"{prefix}.embeddings.word_embeddings.weight",
        dense="cls.predictions.transform.dense",
        norm="cls.predictions.transform.LayerNorm",
        decoder="cls.predictions.decoder",
        bias=("cls.predictions.bias", "cls.predictions.decoder.bias"),
    )


def _roberta_like(prefix: str, norm: str = "layer_norm", activation: str = "=gelu") -> Layout:
    return Layout(
        words=f"{prefix}.embeddings.word_embeddings.weight",
        dense="lm_head.dense",
        norm=f"lm_head.{norm}",
        decoder="lm_head.decoder",
        bias=("lm_head.bias", "lm_head.decoder.bias"),
        activation=activation,
    )


_LAYOUTS: Mapping[str, Layout] = {
    "bert": _bert_like("bert"),
    "roberta": _roberta_like("roberta"),
    "camembert": _roberta_like("roberta"),
    "xlm-roberta": _roberta_like("roberta"),
    "mpnet": _roberta_like("mpnet"),
    "distilbert": Layout(
        words="distilbert.embeddings.word_embeddings.weight",
        dense="vocab_transform",
        norm="vocab_layer_norm",
        decoder="vocab_projector",
        bias=("vocab_projector.bias",),
        activation="activation",
        norm_eps="=1e-12",
    ),
    "modernbert": Layout(
        words="model.embeddings.tok_embeddings.weight",
        dense="head.dense",
        norm="head.norm",
        decoder="decoder",
        bias=("decoder.bias",),
        activation="classifier_activation",
        norm_eps="norm_eps",
    ),
    "electra": Layout(
        words="electra.embeddings.word_embeddings.weight",
        dense="generator_predictions.dense",
        norm="generator_predictions.LayerNorm",
        decoder="generator_lm_head",
        bias=("generator_lm_head.bias",),
        activation="=gelu",
    ),
    "albert": Layout(
        words="albert.embeddings.word_embeddings.weight",
        dense="predictions.dense",
        norm="predictions.LayerNorm",
        decoder="predictions.decoder",
        bias=("predictions.bias", "predictions.decoder.bias"),
    ),
    "gte": _roberta_like("gte", "norm", "hidden_act"),
    "new": _roberta_like("new", "norm", "hidden_act"),
    "eurobert": Layout(words="model.embed_tokens.weight", decoder="lm_head"),
}


def has_masked_lm(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint says that it holds such a head, of an architecture that is known here."""
    return checkpoint.architecture.endswith("ForMaskedLM") and checkpoint.model_type in _LAYOUTS


class MaskedLanguageModelHead(torch.nn.Module):
    """hidden [t, h] in any format -> logits [t, v] in the weights' format."""

    def __init__(self, steps: Sequence[torch.nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        self.steps = torch.nn.Sequential(*steps)
        self.dtype = dtype

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.steps(hidden.to(self.dtype))
        return logits


def load_masked_lm(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> MaskedLanguageModelHead:
    """The head in `dtype`. Raises CheckpointError when a tensor is missing."""
    layout = _LAYOUTS[checkpoint.model_type]
    weights = HeadWeights(checkpoint, "masked-language-model head", layout.names, device, dtype)
    steps = weights.transform(layout.dense, layout.activation, layout.norm, layout.norm_eps, 1e-12)
    decoder = weights.found.get(f"{layout.decoder}.weight")
    bias = next((weights.found[name] for name in layout.bias if name in weights.found), None)
    steps.append(layers.linear(weights.take(layout.words) if decoder is None else decoder, bias))
    return MaskedLanguageModelHead(steps, dtype).eval().requires_grad_(False)
