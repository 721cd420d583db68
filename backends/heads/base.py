"""What a head declares, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from backends.rerank_prompt import asks_for_a_word

if TYPE_CHECKING:
    import torch

    from backends.checkpoint import Checkpoint
    from backends.contract import Task, TensorSpec
    from backends.ragged import Ragged

BGE_M3 = "bge_m3"
"""The word of the option `task` for all three heads of BGE-M3."""

# Architectures of config.json, which modules.json overrules, and a model_type of
# config_sentence_transformers.json.
_OTHER_ARCHITECTURES = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_OTHER_MODEL_TYPES = ("CrossEncoder",)


class Head(Protocol):
    """A loaded head. It keeps no state between calls."""

    def check(self, parameters: Mapping[str, Any]) -> None:
        """Raises RequestError for request parameters that cannot be met."""

    def __call__(
        self, hidden: Ragged, inputs: Mapping[str, torch.Tensor], parameters: Mapping[str, Any]
    ) -> dict[str, torch.Tensor | Ragged]:
        """Hidden states [t, h] of sequences that share their request parameters -> outputs.

        A tensor has one row for each sequence; a Ragged has as many values of each sequence as it says.
        `inputs` holds one value [n] for each sequence or one [t] for each token, by HeadSpec.inputs.
        Raises RequestError for parameters of which only the outputs tell that they cannot be met.
        """


@dataclass(frozen=True)
class HeadSpec:
    """How the model repository and the head stage come to know a head."""

    tasks: Callable[[Checkpoint], tuple[Task, ...]]
    """What a pipeline with this head serves."""
    task_names: tuple[str, ...]
    """What the option `task` may say, in lower case, besides the task's own name: other servers'
    words for it.
    """
    reason: Callable[[Checkpoint], str | None]
    """Why a checkpoint is served with this head when nobody says what it is for; None when it is not."""
    facts: Callable[[Checkpoint], Mapping[str, str]]
    """What the pipeline tells its clients about the head, by PipelineParameter."""
    outputs: Callable[[Checkpoint], tuple[TensorSpec, ...]]
    """Raises CheckpointError when the checkpoint's head cannot be served."""
    inputs: Callable[[Checkpoint], tuple[str, ...]]
    """Tensors that the head reads besides hidden and length."""
    parameters: tuple[str, ...]
    """The request parameters that the head reads; requests that agree in them share a pass."""
    load: Callable[[Checkpoint, torch.device, torch.dtype], Head]
    """In the number format that large products are computed in."""
    stage_class: str = "backends.stages.head.HeadStage"
    is_bulky: bool = False
    """Whether its answer is as large as the hidden states. Inside the encoder, where the server leaves no
    head out, it is served only where the option `task` names it.
    """
    is_heavy: bool = False
    """Whether it computes so much that one core would be too little."""
    check_task_name: Callable[[Checkpoint, str], None] = lambda checkpoint, name: None
    """Raises CheckpointError for a word of task_names that this checkpoint cannot be served as."""
    row: Callable[[Checkpoint], str | None] = lambda checkpoint: None
    """The one token of each sequence that it reads (backends.last_token), where that is all it reads."""
    takes_pairs: bool = False
    """Whether a text may be a pair of texts."""


def is_for_another_task(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint says that it was made for something that no head here is for."""
    if checkpoint.sentence_model_type in _OTHER_MODEL_TYPES or asks_for_a_word(checkpoint) is not None:
        return True
    return not checkpoint.has_modules and checkpoint.architecture.endswith(_OTHER_ARCHITECTURES)
