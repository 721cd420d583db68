"""The encoder's own vector of every token, special tokens included: RTP-LLM's ALL_EMBEDDING, TEI's
/embed_all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from backends.contract import INPUT_IDS, TOKEN_EMBEDDINGS, TOKEN_IDS, RequestParameter, Task, TensorSpec
from backends.heads.base import HeadSpec, is_for_another_task

if TYPE_CHECKING:
    from backends.checkpoint import Checkpoint


def _reason(checkpoint: Checkpoint) -> str | None:
    return None if is_for_another_task(checkpoint) else "every encoder has them"


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
    stage_class="backends.stages.tokens.TokensStage",
)
