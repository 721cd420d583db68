"""Logits of sequence classifiers, of a text or of a pair: rerankers with one label, classifiers with several,
and language models whose next word is the score of a pair.

The head gives them raw; what makes scores or probabilities of them is told to the gateway as facts.

*Source:* sentence-transformers 6.2 cross_encoder/model.py for scores; transformers 5.23
pipelines/text_classification.py for probabilities.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backends.checkpoint import Checkpoint
from backends.contract import LOGITS, PipelineParameter, Task, TensorSpec
from backends.errors import CheckpointError
from backends.heads.base import HeadSpec
from backends.last_token import LAST, UNPADDED
from backends.rerank_prompt import asks_for_a_word, has_both_words, is_language_model, rerank_prompt_of
from backends.tokenizer_file import word_text

if TYPE_CHECKING:
    import torch

    from backends.classifier import ClassificationHead
    from backends.decoder_head import LastTokenHead
    from backends.ragged import Ragged

# What transformers assumes of a config.json that tells nothing of labels.
_DEFAULT_LABELS = 2
_ACTIVATIONS = {"Identity": "identity", "Sigmoid": "sigmoid", "Softmax": "softmax"}
_RERANKER_NAMES = ("reranker", "score")


def labels(checkpoint: Checkpoint) -> list[str]:
    """The names of the labels, in the order of the logits."""
    prompt = rerank_prompt_of(checkpoint)
    if prompt is not None and (is_language_model(checkpoint) or has_both_words(checkpoint, prompt)):
        return [word_text(checkpoint, prompt.true)]
    named = checkpoint.config.get("id2label") or {}
    if isinstance(named, list):
        named = {str(i): name for i, name in enumerate(named)}
    if not isinstance(named, dict):
        raise CheckpointError(f"{checkpoint.path}/config.json: id2label is no object of names by number")
    count = int(checkpoint.config.get("num_labels") or len(named) or _DEFAULT_LABELS)
    return [str(named.get(str(i), f"LABEL_{i}")) for i in range(count)]


def score_activation(checkpoint: Checkpoint) -> str:
    """What makes a score of a logit: identity, sigmoid or softmax. Raises CheckpointError for another."""
    own = checkpoint.sentence_config.get("activation_fn")
    own = own or (checkpoint.config.get("sentence_transformers") or {}).get("activation_fn")
    own = own or checkpoint.config.get("sbert_ce_default_activation_function")
    if own is None:
        return "sigmoid" if len(labels(checkpoint)) == 1 else "identity"
    name = str(own).rsplit(".", 1)[-1]
    if name not in _ACTIVATIONS:
        raise CheckpointError(
            f"{checkpoint.path}/config.json: the activation {own!r} is not served; known are "
            f"{', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def label_activation(checkpoint: Checkpoint) -> str:
    """What makes probabilities of logits."""
    problem = checkpoint.config.get("problem_type")
    if problem == "regression":
        return "identity"
    if problem == "multi_label_classification" or len(labels(checkpoint)) == 1:
        return "sigmoid"
    return "softmax"


class LogitsHead:
    """Applies the classification head."""

    def __init__(self, classifier: ClassificationHead | LastTokenHead) -> None:
        self.classifier = classifier

    def check(self, parameters: Mapping[str, Any]) -> None:
        """It has no parameters."""

    def __call__(
        self, hidden: Ragged, inputs: Mapping[str, torch.Tensor], parameters: Mapping[str, Any]
    ) -> dict[str, torch.Tensor | Ragged]:
        return {LOGITS: self.classifier(hidden)}


def _load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> LogitsHead:
    from backends.classifier import load_classifier
    from backends.decoder_head import DECODERS, load_labels, load_words

    prompt = rerank_prompt_of(checkpoint)
    if prompt is not None and is_language_model(checkpoint):
        return LogitsHead(load_words(checkpoint, prompt, device))
    if checkpoint.model_type in DECODERS:
        return LogitsHead(load_labels(checkpoint, len(labels(checkpoint)), prompt, device))
    return LogitsHead(load_classifier(checkpoint, len(labels(checkpoint)), device))


def _outputs(checkpoint: Checkpoint) -> tuple[TensorSpec, ...]:
    from backends.classifier import LAYOUTS
    from backends.decoder_head import DECODERS

    is_decoder = checkpoint.model_type in DECODERS
    is_classifier = checkpoint.architecture.endswith("ForSequenceClassification")
    is_known = is_classifier and (is_decoder or checkpoint.model_type in LAYOUTS)
    if not is_known and not (is_decoder and is_language_model(checkpoint)):
        raise CheckpointError(
            f"{checkpoint.path} is a {checkpoint.architecture or 'model'} of type {checkpoint.model_type!r}, "
            "which has no classification head that is served"
        )
    if checkpoint.has_modules and any(module.kind != "LogitScore" for module in checkpoint.modules):
        raise CheckpointError(
            f"{checkpoint.path}/modules.json holds the module {checkpoint.modules[0].kind}, which is not "
            "served in a reranker or classifier"
        )
    return (TensorSpec(LOGITS, "FP32", (len(labels(checkpoint)),)),)


def _reason(checkpoint: Checkpoint) -> str | None:
    word = asks_for_a_word(checkpoint)
    if word is not None:
        return word
    is_cross_encoder = checkpoint.sentence_model_type == "CrossEncoder"
    is_classifier = (
        checkpoint.architecture.endswith("ForSequenceClassification") and not checkpoint.has_modules
    )
    if not is_cross_encoder and not is_classifier:
        return None
    count = len(labels(checkpoint))
    what = "one label: a reranker" if count == 1 else f"{count} labels: a classifier"
    prompt = rerank_prompt_of(checkpoint)
    if prompt is not None and has_both_words(checkpoint, prompt):
        what = "two labels that are a reranker's answers"
    asked = "" if prompt is None else f"; its prompt is {prompt.name}"
    return f"config.json says {checkpoint.architecture}, with {what}{asked}"


def _row(checkpoint: Checkpoint) -> str | None:
    from backends.decoder_head import DECODERS

    if checkpoint.model_type not in DECODERS:
        return None
    return LAST if is_language_model(checkpoint) else UNPADDED


def _facts(checkpoint: Checkpoint) -> dict[str, str]:
    facts: dict[str, str] = {
        PipelineParameter.LABELS: json.dumps(labels(checkpoint), ensure_ascii=False),
        PipelineParameter.SCORE_ACTIVATION: score_activation(checkpoint),
        PipelineParameter.LABEL_ACTIVATION: label_activation(checkpoint),
    }
    prompt = rerank_prompt_of(checkpoint)
    if prompt is not None and prompt.is_probability:
        facts[PipelineParameter.SCORE_IS_PROBABILITY] = "true"
    return facts


def _tasks(checkpoint: Checkpoint) -> tuple[Task, ...]:
    """A reranker's logits can be had as a classifier's, too."""
    return (Task.SCORE, Task.CLASSIFY) if len(labels(checkpoint)) == 1 else (Task.CLASSIFY,)


def check_task_name(checkpoint: Checkpoint, name: str) -> None:
    """Raises CheckpointError for a classifier that is to be a reranker."""
    if not checkpoint.architecture.endswith("ForSequenceClassification"):
        return
    count = len(labels(checkpoint))
    if name in _RERANKER_NAMES and count != 1:
        raise CheckpointError(
            f"{checkpoint.path} has {count} labels ({', '.join(labels(checkpoint)[:5])}); a reranker has one"
        )


HEAD = HeadSpec(
    tasks=_tasks,
    task_names=("classify", "classifier", "seq_classification", *_RERANKER_NAMES),
    reason=_reason,
    facts=_facts,
    outputs=_outputs,
    inputs=lambda checkpoint: (),
    parameters=(),
    load=_load,
    check_task_name=check_task_name,
    takes_pairs=True,
    row=_row,
)
