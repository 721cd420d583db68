"""What a head declares, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from backends.checkpoint import Checkpoint
    from backends.contract import Task, TensorSpec
    from backends.ragged import Ragged


class Head(Protocol):
    """A loaded head. It keeps no state between calls."""

    def check(self, parameters: Mapping[str, Any]) -> None:
        """Raises RequestError for request parameters that cannot be met."""

    def __call__(
        self, hidden: Ragged, inputs: Mapping[str, torch.Tensor], parameters: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Hidden states [t, h] of sequences that share their request parameters -> outputs with one row each.

        `inputs` holds one value [n] for each sequence, by the names in HeadSpec.inputs.
        """


@dataclass(frozen=True)
class HeadSpec:
    """How the model repository and the head stage come to know a head."""

    task: Task
    task_names: tuple[str, ...]
    """What the option `task` may say, in lower case, besides the task's own name: other servers'
    words for it.
    """
    is_default: Callable[[Checkpoint], bool]
    """Whether a checkpoint is served with this head when nobody says what it is for."""
    facts: Callable[[Checkpoint], Mapping[str, str]]
    """What the pipeline tells its clients about the head, by PipelineParameter."""
    outputs: Callable[[Checkpoint], tuple[TensorSpec, ...]]
    """Raises CheckpointError when the checkpoint's head cannot be served."""
    inputs: Callable[[Checkpoint], tuple[str, ...]]
    """Tensors with one value for each sequence that the head reads besides hidden and length."""
    parameters: tuple[str, ...]
    """The request parameters that the head reads; requests that agree in them share a pass."""
    load: Callable[[Checkpoint, torch.device], Head]
