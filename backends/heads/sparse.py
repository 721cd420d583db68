"""Weights of some tokens of the vocabulary, for search engines with an inverted index.

Two kinds: BGE-M3 gives a weight to each token of the text (`sparse_linear.pt`; relu, the largest for each id,
without [CLS], end, padding and unknown), SPLADE lets the masked-language-model head name words that the text
does not hold (log(1 + relu), the largest or the sum over the text).

*Source:* FlagEmbedding 1.4.2 inference/embedder/encoder_only/m3.py; sentence-transformers 6.2
sparse_encoder/modules/splade_pooling.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.checkpoint import Checkpoint, Module
from backends.contract import (
    INPUT_IDS,
    SPARSE_COUNT,
    SPARSE_INDICES,
    SPARSE_WEIGHTS,
    ErrorCode,
    RequestParameter,
    Task,
    TensorSpec,
)
from backends.errors import CheckpointError, RequestError
from backends.heads.base import BGE_M3, HeadSpec, is_for_another_task

if TYPE_CHECKING:
    import torch

    from backends.ragged import Ragged

# Tokens whose logits over the whole vocabulary are kept at once: 31 MB for a vocabulary of 30 522.
_CHUNK = 256
_POOLINGS = ("max", "sum")
_ACTIVATIONS = ("relu", "log1p_relu")
# Of kernels, which take several texts at once: as much for a vocabulary of 30 522, in half precision.
_KERNEL_CHUNK = 2048
# Tokens of the text that say nothing about it, by their names in tokenizer_config.json.
_UNUSED = ("cls_token", "eos_token", "pad_token", "unk_token")


Triples = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]
"""segment, index, weight [k], ordered by segment, then by index."""


class SparseHead:
    """Makes (segment, index, weight) triples by one of the two kinds, and keeps the largest."""

    def __init__(
        self, weigh: Callable[[Ragged, Mapping[str, torch.Tensor]], Triples], default_top_k: int | None
    ) -> None:
        self.weigh = weigh
        self.default_top_k = default_top_k

    def check(self, parameters: Mapping[str, Any]) -> None:
        wanted = parameters.get(RequestParameter.TOP_K)
        is_number = isinstance(wanted, int) and not isinstance(wanted, bool)
        if wanted is not None and not (is_number and wanted >= 1):
            raise RequestError(
                ErrorCode.INVALID_TOP_K, f"top_k is {wanted!r}; it takes a whole number of at least 1"
            )

    def __call__(
        self, hidden: Ragged, inputs: Mapping[str, torch.Tensor], parameters: Mapping[str, Any]
    ) -> dict[str, torch.Tensor | Ragged]:
        from backends.ragged import Ragged

        triples = self.weigh(hidden, inputs)
        wanted = parameters.get(RequestParameter.TOP_K, self.default_top_k)
        segments, indices, weights = triples if wanted is None else _largest(triples, wanted)
        counts = np.bincount(segments.cpu().numpy(), minlength=len(hidden.lengths)).astype(np.int64)
        return {
            SPARSE_INDICES: Ragged(indices.int(), counts),
            SPARSE_WEIGHTS: Ragged(weights.float(), counts),
        }


def _largest(triples: Triples, count: int) -> Triples:
    """The `count` largest weights of each segment; of equal ones the smaller index."""
    import torch

    segments, indices, weights = triples
    order = torch.argsort(weights, descending=True, stable=True)
    order = order[torch.argsort(segments[order], stable=True)]
    sizes = torch.bincount(segments)
    starts = torch.cumsum(sizes, 0) - sizes
    rank = torch.arange(len(order), device=order.device) - starts[segments[order]]
    kept = order[rank < count].sort().values
    return segments[kept], indices[kept], weights[kept]


class TokenWeights:
    """BGE-M3: relu(w h + b) of each token, and of equal tokens the largest."""

    def __init__(self, linear: torch.nn.Module, unused: torch.Tensor, vocabulary: int) -> None:
        self.linear = linear
        self.unused = unused
        self.vocabulary = vocabulary

    def __call__(self, hidden: Ragged, inputs: Mapping[str, torch.Tensor]) -> Triples:
        import torch

        from backends.device import has_kernels
        from kernels.transfer import to_device

        weights = torch.relu(self.linear(hidden.values.float()))[:, 0]
        ids = to_device(inputs[INPUT_IDS], weights.device).long()
        if has_kernels(weights.device):
            return self._by_kernel(weights, ids, hidden)
        kept = ((weights > 0) & ~torch.isin(ids, self.unused)).nonzero()[:, 0]
        pairs, place = torch.unique(hidden.segments[kept] * self.vocabulary + ids[kept], return_inverse=True)
        largest = weights.new_zeros(len(pairs)).scatter_reduce_(0, place, weights[kept], "amax")
        return pairs // self.vocabulary, pairs % self.vocabulary, largest

    def _by_kernel(self, weights: torch.Tensor, ids: torch.Tensor, hidden: Ragged) -> Triples:
        # Triton is not imported where there is no use for it.
        from kernels.sparse_max import lexical_weights

        largest = lexical_weights(weights, ids, hidden.lengths.tolist(), self.unused)
        kept = largest.nonzero()[:, 0]
        segments = hidden.segments[kept]
        order = (segments * self.vocabulary + ids[kept]).argsort()
        return segments[order], ids[kept[order]], largest[kept[order]]


class Splade:
    """Logits of every token over the vocabulary -> one vector for each text, of which the positive
    ones stay.
    """

    def __init__(self, logits: torch.nn.Module, pooling: str, activation: str) -> None:
        self.logits = logits
        self.pooling = pooling
        self.n_logs = _ACTIVATIONS.index(activation) + 1

    def __call__(self, hidden: Ragged, inputs: Mapping[str, torch.Tensor]) -> Triples:
        import torch

        from backends.device import has_kernels
        from backends.grouping import neighbours

        rows = hidden.split()
        parts = [range(i, i + 1) for i in range(len(rows))]
        is_kernel = has_kernels(hidden.values.device)
        if is_kernel:
            parts = neighbours(hidden.lengths.tolist(), _KERNEL_CHUNK)
        found = []
        for part in parts:
            texts = rows[part.start : part.stop]
            is_small = sum(map(len, texts)) <= _KERNEL_CHUNK
            pooled = self._pool_texts(texts) if is_kernel and is_small else self._pool_text(texts[0])[None]
            segments, indices = pooled.nonzero(as_tuple=True)
            found.append((segments + part.start, indices, pooled[segments, indices]))
        segments, indices, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
        return segments, indices, weights

    def _pool_texts(self, texts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Hidden states of neighbours -> [n, v], by a kernel."""
        import torch

        # Triton is not imported where there is no use for it.
        from kernels.sparse_max import splade

        logits = self.logits(torch.cat(list(texts)))
        return splade(logits, [len(text) for text in texts], pooling=self.pooling, n_logs=self.n_logs)

    def _pool_text(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [s, h] -> [v]; a long sequence in chunks, so that memory stays bounded."""
        import torch

        pooled: torch.Tensor | None = None
        for chunk in torch.split(rows, _CHUNK):
            values = torch.relu(self.logits(chunk).float())
            if self.pooling == "max":
                # log1p keeps the order, so it is taken once, of the largest.
                part = values.amax(0)
                pooled = part if pooled is None else torch.maximum(pooled, part)
            else:
                part = self._log(values).sum(0)
                pooled = part if pooled is None else pooled + part
        assert pooled is not None
        return self._log(pooled) if self.pooling == "max" else pooled

    def _log(self, values: torch.Tensor) -> torch.Tensor:
        for _ in range(self.n_logs):
            values = values.log1p()
        return values


def _pooling(checkpoint: Checkpoint) -> Module | None:
    return next((module for module in checkpoint.modules if module.kind == "SpladePooling"), None)


def _splade_settings(checkpoint: Checkpoint) -> tuple[str, str]:
    """(pooling, activation). Raises CheckpointError."""
    module = _pooling(checkpoint)
    config = module.config if module is not None else {}
    pooling = str(config.get("pooling_strategy") or "max")
    activation = str(config.get("activation_function") or "relu")
    choices = (("pooling_strategy", pooling, _POOLINGS), ("activation_function", activation, _ACTIVATIONS))
    for name, value, known in choices:
        if value not in known:
            raise CheckpointError(
                f"{checkpoint.path}: {name} {value!r} of its SpladePooling is not served; it takes "
                f"{', '.join(known)}"
            )
    others = [m.kind for m in checkpoint.modules if m is not module]
    if checkpoint.has_modules and others:
        what = "beside SpladePooling" if module is not None else "in a sparse model"
        raise CheckpointError(f"{checkpoint.path}/modules.json: {others[0]} {what} is not served")
    return pooling, activation


def _check(checkpoint: Checkpoint) -> None:
    if checkpoint.side_file("sparse_linear") is not None:
        return
    _splade_settings(checkpoint)
    from backends.masked_lm import has_masked_lm

    if not has_masked_lm(checkpoint):
        raise CheckpointError(
            f"{checkpoint.path} has no sparse head: no sparse_linear.pt, and the "
            f"{checkpoint.architecture or 'model'} has no masked-language-model head that is served"
        )


def _outputs(checkpoint: Checkpoint) -> tuple[TensorSpec, ...]:
    _check(checkpoint)
    return (
        TensorSpec(SPARSE_INDICES, "INT32", (-1,)),
        TensorSpec(SPARSE_WEIGHTS, "FP32", (-1,)),
        TensorSpec(SPARSE_COUNT, "INT32", (1,)),
    )


def _load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> SparseHead:
    import torch

    from backends.masked_lm import load_masked_lm
    from backends.tokenizer_file import special_token_ids
    from backends.weights import linear_from, read_tensors

    top_k = checkpoint.sentence_config.get("max_active_dims")
    file = checkpoint.side_file("sparse_linear")
    if file is None:
        logits = load_masked_lm(checkpoint, device, dtype)
        return SparseHead(Splade(logits, *_splade_settings(checkpoint)), top_k)
    linear = linear_from(read_tensors(file, ["weight", "bias"]), device)
    unused = torch.tensor(special_token_ids(checkpoint, _UNUSED), dtype=torch.int64, device=device)
    return SparseHead(TokenWeights(linear, unused, int(checkpoint.config["vocab_size"])), top_k)


def _reason(checkpoint: Checkpoint) -> str | None:
    if checkpoint.side_file("sparse_linear") is not None:
        return "it has sparse_linear.pt (BGE-M3)"
    if is_for_another_task(checkpoint):
        return None
    if _pooling(checkpoint) is not None:
        return "modules.json has a SpladePooling (SPLADE)"
    if checkpoint.sentence_model_type == "SparseEncoder":
        return "config_sentence_transformers.json says SparseEncoder"
    return None


def _inputs(checkpoint: Checkpoint) -> Sequence[str]:
    return (INPUT_IDS,) if checkpoint.side_file("sparse_linear") is not None else ()


HEAD = HeadSpec(
    tasks=lambda checkpoint: (Task.SPARSE,),
    task_names=("sparse", "sparse_embedding", BGE_M3),
    reason=_reason,
    facts=lambda checkpoint: {},
    outputs=_outputs,
    inputs=lambda checkpoint: tuple(_inputs(checkpoint)),
    parameters=(RequestParameter.TOP_K,),
    load=_load,
    is_heavy=True,
)
