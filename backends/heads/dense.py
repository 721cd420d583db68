"""Dense embeddings: the sentence-transformers chain behind the transformer, as modules.json tells it.

Pooling over each sequence, then Dense, LayerNorm and Normalize in any order. Everything is computed in
float32.

*Source:* sentence-transformers 6.2, sentence_transformer/modules and base/modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from backends.checkpoint import Checkpoint, Module
from backends.contract import (
    DENSE,
    INPUT_IDS,
    PROMPT_LENGTH,
    ErrorCode,
    PipelineParameter,
    RequestParameter,
    Task,
    TensorSpec,
)
from backends.errors import CheckpointError, RequestError
from backends.heads.base import BGE_M3, HeadSpec, is_for_another_task
from backends.last_token import LAST

if TYPE_CHECKING:
    import torch

    from backends.ragged import Ragged
    from backends.sentence_modules import Pooling

    Chain = Callable[[Ragged, Mapping[str, torch.Tensor]], torch.Tensor]
    """hidden [t, h], inputs by name -> float32 [n, d]."""

POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# The booleans of older checkpoints; several of them are concatenated in this order.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Values of model_type in config_sentence_transformers.json, and an architecture, of models that pool nothing.
_UNPOOLED = ("SparseEncoder", "MultiVectorEncoder", "ColBERT", "HF_ColBERT")
_LINKS = ("Dense", "LayerNorm", "Normalize")
_SENTENCE = "sentence_embedding"


def pooling_modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The modes of a Pooling module's config.json, to be concatenated in this order."""
    declared = config.get("pooling_mode")
    if declared is None:
        return tuple(mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)) or ("mean",)
    modes = (declared,) if isinstance(declared, str) else tuple(declared)
    if not modes:
        raise CheckpointError(f"a Pooling has no mode; the modes are {', '.join(POOLING_MODES)}")
    for mode in modes:
        if mode not in POOLING_MODES:
            raise CheckpointError(
                f"pooling mode {mode!r} is not served; the modes are {', '.join(POOLING_MODES)}"
            )
    return modes


def pools_without_prompt(checkpoint: Checkpoint) -> bool:
    """Whether the tokens of the prompt are left out of the pooling."""
    return any(
        m.kind == "Pooling" and m.code is None and m.config.get("include_prompt") is False
        for m in checkpoint.modules
    )


def has_own_code(checkpoint: Checkpoint) -> bool:
    """Whether a module of the chain is a class that the checkpoint brings."""
    return any(module.code is not None for module in checkpoint.modules)


def dimensions(checkpoint: Checkpoint) -> int | None:
    """Components of an embedding, as far as the checkpoint's truncate_dim lets them out; None where only its
    own code knows.
    """
    size = own_code_size(checkpoint) if has_own_code(checkpoint) else chain_size(checkpoint)
    return size if size is None or checkpoint.truncate_dim is None else min(size, checkpoint.truncate_dim)


def own_code_size(checkpoint: Checkpoint) -> int | None:
    """What the modules behind the last one of the checkpoint's own code say; they are not checked further."""
    size = None
    for module in checkpoint.modules:
        declared = module.config.get("out_features") or module.config.get("embedding_dimension")
        if module.code is not None or module.kind == "Dense":
            size = declared if isinstance(declared, int) else None
    return size


def chain_size(checkpoint: Checkpoint) -> int:
    """Components that the chain makes. Raises CheckpointError for a chain that cannot be served."""
    where = f"{checkpoint.path}/modules.json"
    first, *rest = checkpoint.modules or (None,)
    if first is None or first.kind != "Pooling":
        raise CheckpointError(
            f"{where} has {first.kind if first else 'nothing'} behind the Transformer; only a Pooling there "
            "makes one vector of each text"
        )
    size = checkpoint.hidden_size * len(pooling_modes(first.config))
    for module in rest:
        if module.kind not in _LINKS:
            raise CheckpointError(
                f"{where} holds the module {module.kind}, which is not served; behind the Pooling there may "
                f"be {', '.join(_LINKS)}"
            )
        size = _link_size(module, size)
    return size


def _link_size(module: Module, size: int) -> int:
    config = module.config
    for name in ("module_input_name", "module_output_name"):
        if (config.get(name) or _SENTENCE) != _SENTENCE:
            raise CheckpointError(
                f"{module.path}/config.json: {name} is {config[name]!r}; only {_SENTENCE} is served"
            )
    if module.kind == "Normalize":
        return size
    name = "in_features" if module.kind == "Dense" else "dimension"
    if config.get(name) != size:
        raise CheckpointError(
            f"{module.path}/config.json says {name} {config.get(name)}; {size} features come in"
        )
    if module.kind == "LayerNorm":
        return size
    if not isinstance(config.get("out_features"), int):
        raise CheckpointError(f"{module.path}/config.json has no out_features")
    return int(config["out_features"])


class DenseHead:
    """Applies the chain, then what the request asks of the result."""

    def __init__(self, chain: Chain, size: int | None, normalizes: bool, sizes: Sequence[int] = ()) -> None:
        """`sizes` are those that an embedding may be cut to, where the checkpoint lists them."""
        self.chain = chain
        self.size = size
        self.sizes = sizes
        self.normalizes = normalizes

    def check(self, parameters: Mapping[str, Any]) -> None:
        normalize = parameters.get(RequestParameter.NORMALIZE)
        if normalize is not None and not isinstance(normalize, bool):
            raise RequestError(ErrorCode.INVALID_INPUT, f"normalize is {normalize!r}; it takes true or false")
        wanted = parameters.get(RequestParameter.DIMENSIONS)
        is_number = isinstance(wanted, int) and not isinstance(wanted, bool)
        is_listed = not self.sizes or wanted in (*self.sizes, self.size)
        if wanted is not None and not (is_number and is_listed and 1 <= wanted <= (self.size or wanted)):
            takes = f"1 to {self.size}" if self.size else "a whole number from 1 up"
            if self.sizes:
                takes = f"one of {', '.join(map(str, self.sizes))}"
            raise RequestError(
                ErrorCode.INVALID_DIMENSIONS, f"dimensions is {wanted}; this model takes {takes}"
            )

    def __call__(
        self, hidden: Ragged, inputs: Mapping[str, torch.Tensor], parameters: Mapping[str, Any]
    ) -> dict[str, torch.Tensor | Ragged]:
        vectors = self.chain(hidden, inputs)
        # Cutting first and normalising last gives a cut vector its unit length back.
        wanted = parameters.get(RequestParameter.DIMENSIONS)
        if wanted is not None and wanted > vectors.shape[1]:
            # Only the checkpoint's own code knew before.
            raise RequestError(
                ErrorCode.INVALID_DIMENSIONS,
                f"dimensions is {wanted}; this model takes 1 to {vectors.shape[1]}",
            )
        vectors = vectors[:, : wanted or self.size]
        if parameters.get(RequestParameter.NORMALIZE, self.normalizes or wanted is not None):
            vectors = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return {DENSE: vectors.contiguous()}


class PooledChain:
    """Pooling, then modules over one vector for each sequence."""

    def __init__(self, pooling: Pooling, links: Sequence[torch.nn.Module]) -> None:
        self.pooling = pooling
        self.links = links

    def __call__(self, hidden: Ragged, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        vectors = self.pooling(hidden, inputs.get(PROMPT_LENGTH))
        for link in self.links:
            vectors = link(vectors)
        return vectors


def _load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> DenseHead:
    from backends.sentence_modules import Pooling, load_link

    modules = checkpoint.modules
    normalizes = len(modules) > 1 and modules[-1].kind == "Normalize" and modules[-1].code is None
    if has_own_code(checkpoint):
        from backends.own_code import OwnChain

        chain: Chain = OwnChain(checkpoint, modules[:-1] if normalizes else modules, pooling_modes, device)
    else:
        first, *rest = modules
        links = [load_link(module, device) for module in (rest[:-1] if normalizes else rest)]
        chain = PooledChain(Pooling(pooling_modes(first.config)), links)
    return DenseHead(chain, dimensions(checkpoint), normalizes, checkpoint.matryoshka_dimensions)


def _inputs(checkpoint: Checkpoint) -> tuple[str, ...]:
    own = (INPUT_IDS,) if has_own_code(checkpoint) else ()
    return (*own, PROMPT_LENGTH) if pools_without_prompt(checkpoint) else own


def _row(checkpoint: Checkpoint) -> str | None:
    """Of a decoder's embedding, which is its last token, nothing else is read."""
    first = checkpoint.modules[0] if checkpoint.modules else None
    if has_own_code(checkpoint) or first is None or first.kind != "Pooling":
        return None
    return LAST if pooling_modes(first.config) == ("lasttoken",) else None


def _reason(checkpoint: Checkpoint) -> str | None:
    """Everything but what says that it was made for another task."""
    if is_for_another_task(checkpoint):
        return None
    if checkpoint.sentence_model_type in _UNPOOLED:
        return None
    if not checkpoint.has_modules and checkpoint.architecture in _UNPOOLED:
        return None
    first = checkpoint.modules[0] if checkpoint.modules else None
    if first is not None and first.code is not None:
        return "its tokens are pooled (own code)"
    if first is not None and first.kind == "SpladePooling":
        return None
    how = (
        "+".join(pooling_modes(first.config)) if first is not None and first.kind == "Pooling" else "own code"
    )
    if checkpoint.model_type == "clip":
        return "texts and images, each by a model of its own"
    what = "texts, images and both" if checkpoint.is_multimodal else "its tokens"
    return f"{what} are pooled ({how})"


def _facts(checkpoint: Checkpoint) -> dict[str, str]:
    size = dimensions(checkpoint)
    pooling = next((m for m in checkpoint.modules if m.kind == "Pooling" and m.code is None), None)
    facts: dict[str, str] = {}
    if pooling is not None:
        facts[PipelineParameter.POOLING] = ",".join(pooling_modes(pooling.config))
    if size is not None:
        facts[PipelineParameter.DIMENSIONS] = str(size)
    if checkpoint.matryoshka_dimensions:
        facts[PipelineParameter.MATRYOSHKA_DIMENSIONS] = ",".join(map(str, checkpoint.matryoshka_dimensions))
    return facts


HEAD = HeadSpec(
    tasks=lambda checkpoint: (Task.EMBED,),
    task_names=("embed", "dense_embedding", "dense", BGE_M3),
    reason=_reason,
    facts=_facts,
    outputs=lambda checkpoint: (TensorSpec(DENSE, "FP32", (dimensions(checkpoint) or -1,)),),
    inputs=_inputs,
    parameters=(RequestParameter.DIMENSIONS, RequestParameter.NORMALIZE),
    load=_load,
    row=_row,
)
