"""The encoder's own vector of every token, special tokens included: RTP-LLM's ALL_EMBEDDING, TEI's
/embed_all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from backends.contract import INPUT_IDS, TOKEN_EMBEDDINGS, TOKEN_IDS, RequestParameter, Task, TensorSpec
from backends.errors import CheckpointError
from backends.heads.base import HeadSpec, is_for_another_task

if TYPE_CHECKING:
    from backends.checkpoint import Checkpoint


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
    load=None,
    check_task_name=check_task_name,
    stage_class="backends.stages.tokens.TokensStage",
)
