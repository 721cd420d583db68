"""The encoder's own vector of every token, special tokens included: RTP-LLM's ALL_EMBEDDING, TEI's
/embed_all.

It has a stage of its own, without torch; what is here runs inside the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backends.contract import (
    INPUT_IDS,
    TOKEN_EMBEDDINGS,
    TOKEN_IDS,
    ErrorCode,
    RequestParameter,
    Task,
    TensorSpec,
)
from backends.errors import CheckpointError, RequestError
from backends.heads.base import HeadSpec, is_for_another_task

if TYPE_CHECKING:
    import torch

    from backends.checkpoint import Checkpoint
    from backends.ragged import Ragged


def check_normalize(parameters: Mapping[str, Any]) -> bool:
    """Whether vectors get unit length. Raises RequestError."""
    normalize = parameters.get(RequestParameter.NORMALIZE, False)
    if not isinstance(normalize, bool):
        raise RequestError(ErrorCode.INVALID_INPUT, f"normalize is {normalize!r}; it takes true or false")
    return normalize


class TokensHead:
    """Hands hidden states on as float32, normalised where the request asks for that."""

    def check(self, parameters: Mapping[str, Any]) -> None:
        check_normalize(parameters)

    def __call__(
        self, hidden: Ragged, inputs: Mapping[str, torch.Tensor], parameters: Mapping[str, Any]
    ) -> dict[str, torch.Tensor | Ragged]:
        from backends.ragged import Ragged

        vectors = hidden.values.float()
        if check_normalize(parameters):
            vectors = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return {
            TOKEN_EMBEDDINGS: Ragged(vectors, hidden.lengths),
            TOKEN_IDS: Ragged(inputs[INPUT_IDS], hidden.lengths),
        }


def _reason(checkpoint: Checkpoint) -> str | None:
    # Of images there are thousands, which nobody asks for.
    is_left_out = is_for_another_task(checkpoint) or checkpoint.is_multimodal
    return None if is_left_out else "every encoder has them"


def check_task_name(checkpoint: Checkpoint, name: str) -> None:
    """Raises CheckpointError for a model whose encoder gives one vector for each item."""
    if checkpoint.model_type == "clip":
        raise CheckpointError(
            f"{checkpoint.path} is a CLIP model, which has one vector for each text or image"
        )


HEAD = HeadSpec(
    tasks=lambda checkpoint: (Task.TOKENS,),
    task_names=(
        "tokens",
        "all_embedding",
    ),
    reason=_reason,
    facts=lambda checkpoint: {},
    outputs=lambda checkpoint: (
        TensorSpec(TOKEN_EMBEDDINGS, "FP32", (-1, checkpoint.hidden_size)),
        TensorSpec(TOKEN_IDS, "INT32", (-1,)),
    ),
    inputs=lambda checkpoint: (INPUT_IDS,),
    parameters=(RequestParameter.NORMALIZE,),
    load=lambda checkpoint, device, dtype: TokensHead(),
    check_task_name=check_task_name,
    stage_class="backends.stages.tokens.TokensStage",
    is_bulky=True,
)
