"""The classification head of an encoder, without the encoder: hidden states of a batch -> logits [n, labels].

Pools (mostly the first token), then dense, activation, maybe a norm, and the last layer: every architecture
does the same under other names. Computed in float32.

*Source:* transformers 5.23, the ForSequenceClassification class of each architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError
from backends.head_weights import HeadWeights, setting
from backends.ragged import Ragged
from backends.sentence_modules import Pooling


@dataclass(frozen=True)
class Layout:
    """Names of the head's tensors in the checkpoint."""

    output: str
    dense: str | None = None
    norm: str | None = None
    activation: str = "=tanh"
    """The entry of config.json, or with a leading "=" the activation itself."""
    pooling: str = "=cls"
    """The same for the pooling: cls, bos, mean, or late (which means the logits)."""
    norm_eps: str = "norm_eps"

    @property
    def names(self) -> list[str]:
        """Everything that may be there."""
        parts = (self.output, self.dense, self.norm)
        return [f"{part}.{kind}" for part in parts if part for kind in ("weight", "bias")]


_ROBERTA = Layout("classifier.out_proj", dense="classifier.dense")
LAYOUTS: Mapping[str, Layout] = {
    "bert": Layout("classifier", dense="bert.pooler.dense"),
    "nomic_bert": Layout("classifier", dense="nomic_bert.pooler.dense"),
    "gte": Layout("classifier", dense="gte.pooler.dense"),
    "new": Layout("classifier", dense="new.pooler.dense"),
    "roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "xlm-roberta-xl": _ROBERTA,
    "jina_embeddings_v3": _ROBERTA,
    "mpnet": _ROBERTA,
    "electra": Layout("classifier.out_proj", dense="classifier.dense", activation="=gelu"),
    "distilbert": Layout("classifier", dense="pre_classifier", activation="=relu"),
    "albert": Layout("classifier", dense="albert.pooler"),
    "deberta": Layout("classifier", dense="pooler.dense", activation="pooler_hidden_act"),
    "deberta-v2": Layout("classifier", dense="pooler.dense", activation="pooler_hidden_act"),
    "modernbert": Layout(
        "classifier",
        dense="head.dense",
        norm="head.norm",
        activation="classifier_activation",
        pooling="classifier_pooling",
    ),
    "eurobert": Layout("classifier", dense="dense", activation="=gelu", pooling="classifier_pooling"),
}


class ClassificationHead(torch.nn.Module):
    """hidden [t, h] in any format -> float32 logits [n, labels]."""

    def __init__(self, pooling: str, steps: list[torch.nn.Module]) -> None:
        super().__init__()
        self.steps = torch.nn.Sequential(*steps)
        self.is_late = pooling == "late"
        self.pooling = Pooling(["mean" if pooling in ("mean", "late") else "cls"])

    def forward(self, hidden: Ragged) -> torch.Tensor:
        if self.is_late:
            return self.pooling(Ragged(self.steps(hidden.values.float()), hidden.lengths))
        logits: torch.Tensor = self.steps(self.pooling(hidden))
        return logits


def load_classifier(checkpoint: Checkpoint, n_labels: int, device: torch.device) -> ClassificationHead:
    """The head in float32. Raises CheckpointError when a tensor is missing, or has other labels than told."""
    layout = LAYOUTS[checkpoint.model_type]
    weights = HeadWeights(checkpoint, "classification head", layout.names, device, torch.float32)
    n_own = weights.take(f"{layout.output}.weight").shape[0]
    if n_own != n_labels:
        raise CheckpointError(
            f"{weights.folder}: the classification head has {n_own} labels, but config.json tells of "
            f"{n_labels} (two where it has neither num_labels nor id2label); give it the right id2label"
        )
    steps = weights.transform(layout.dense, layout.activation, layout.norm, layout.norm_eps, 1e-5)
    steps.append(weights.linear(layout.output))
    pooling = str(setting(checkpoint.config, layout.pooling, "cls"))
    return ClassificationHead(pooling, steps).eval().requires_grad_(False)
