"""One vector for each token, projected and of unit length, for late interaction (MaxSim).

*Source:* FlagEmbedding 1.4.2 for BGE-M3; sentence-transformers 6.2 MultiVectorEncoder for PyLate, Stanford's
ColBERT and its own layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.checkpoint import Checkpoint
from backends.contract import (
    INPUT_IDS,
    TOKEN_VECTORS,
    VECTOR_COUNT,
    ErrorCode,
    PipelineParameter,
    RequestParameter,
    Task,
    TensorSpec,
)
from backends.errors import CheckpointError, RequestError
from backends.heads.base import BGE_M3, HeadSpec
from backends.late_interaction import LateInteraction, late_interaction_of

if TYPE_CHECKING:
    import torch

    from backends.ragged import Ragged

_WHY = {
    "bge_m3": "it has colbert_linear.pt (BGE-M3)",
    "stanford": "config.json says HF_ColBERT (Stanford's layout)",
    "pylate": "config_sentence_transformers.json says ColBERT (PyLate's layout)",
    "sentence_transformers": "modules.json describes a MultiVectorEncoder",
}


class ColbertHead:
    """Projects every token, and leaves out those that are not to be compared."""

    def __init__(
        self, late: LateInteraction, links: Sequence[torch.nn.Module], skipped: torch.Tensor | None
    ) -> None:
        self.late = late
        self.links = links
        self.skipped = skipped

    def check(self, parameters: Mapping[str, Any]) -> None:
        normalize = parameters.get(RequestParameter.NORMALIZE)
        if normalize is not None and not isinstance(normalize, bool):
            raise RequestError(ErrorCode.INVALID_INPUT, f"normalize is {normalize!r}; it takes true or false")

    def __call__(
        self, hidden: Ragged, inputs: Mapping[str, torch.Tensor], parameters: Mapping[str, Any]
    ) -> dict[str, torch.Tensor | Ragged]:
        import torch

        from backends.ragged import Ragged
        from kernels.transfer import to_device

        role = parameters.get(RequestParameter.ROLE) or "document"
        kept = torch.ones(hidden.values.shape[0], dtype=torch.bool, device=hidden.values.device)
        if self.late.drops_first:
            kept[to_device(hidden.offsets[:-1], kept.device)] = False
        if self.skipped is not None and role in self.late.skip_roles:
            kept &= ~torch.isin(to_device(inputs[INPUT_IDS], kept.device), self.skipped)
        rows = kept.nonzero()[:, 0]
        vectors = hidden.values[rows].float()
        for link in self.links:
            vectors = link(vectors)
        if parameters.get(RequestParameter.NORMALIZE, self.late.normalizes):
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        counts = np.bincount(hidden.segments[rows].cpu().numpy(), minlength=len(hidden.lengths))
        return {TOKEN_VECTORS: Ragged(vectors, counts.astype(np.int64))}


def _late(checkpoint: Checkpoint) -> LateInteraction:
    late = late_interaction_of(checkpoint)
    if late is None:
        raise CheckpointError(
            f"{checkpoint.path} has no vectors for each token: no colbert_linear.pt, no ColBERT layout"
        )
    return late


def _load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> ColbertHead:
    import torch

    from backends.sentence_modules import load_link
    from backends.tokenizer_file import token_ids_of
    from backends.weights import linear_from, read_tensors

    late = _late(checkpoint)
    links = [load_link(module, device) for module in late.links]
    if late.layout == "stanford":
        weights = read_tensors(checkpoint.transformer_path, ["linear.weight"])
        links.append(linear_from({"weight": weights["linear.weight"]}, device))
    elif late.weights is not None:
        links.append(linear_from(read_tensors(late.weights, ["weight", "bias"]), device))
    skipped = token_ids_of(checkpoint, late.skip_words)
    return ColbertHead(late, links, torch.tensor(skipped, device=device) if skipped else None)


def _outputs(checkpoint: Checkpoint) -> tuple[TensorSpec, ...]:
    size = _late(checkpoint).size(checkpoint.hidden_size)
    return (
        TensorSpec(TOKEN_VECTORS, "FP32", (-1, size or -1)),
        TensorSpec(VECTOR_COUNT, "INT32", (1,)),
    )


def _reason(checkpoint: Checkpoint) -> str | None:
    late = late_interaction_of(checkpoint)
    return None if late is None else _WHY[late.layout]


def _facts(checkpoint: Checkpoint) -> dict[str, str]:
    return {PipelineParameter.ROLES: "true"} if _late(checkpoint).has_roles else {}


HEAD = HeadSpec(
    tasks=lambda checkpoint: (Task.COLBERT,),
    task_names=("colbert", "colbert_embedding", BGE_M3),
    reason=_reason,
    facts=_facts,
    outputs=_outputs,
    inputs=lambda checkpoint: (INPUT_IDS,) if _late(checkpoint).skip_words else (),
    parameters=(RequestParameter.ROLE, RequestParameter.NORMALIZE),
    load=_load,
)
