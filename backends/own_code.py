"""Modules of a sentence-transformers chain whose class lies in a .py file inside the checkpoint.

Such a class has `load(path)`, which gives a torch module, and a forward from a dict of features to a dict of
features. Its features are padded, [n, s, ...], as in sentence-transformers and RTP-LLM: input_ids,
attention_mask, token_embeddings, input_lengths, and sentence_embedding once something has pooled. It may name
those that it wants in `forward_args()`.

*Source:* sentence-transformers 6.2 base/model.py; RTP-LLM's contract of custom modules.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from backends.checkpoint import Checkpoint, Module
from backends.contract import INPUT_IDS, PROMPT_LENGTH
from backends.errors import CheckpointError
from backends.ragged import Ragged, cut_by_budget
from backends.sentence_modules import Pooling, load_link

_TOKENS = "token_embeddings"
_SENTENCE = "sentence_embedding"
_FEATURES = ("input_lengths", "input_ids", "attention_mask", _TOKENS, _SENTENCE)
_LINKS = ("Dense", "LayerNorm", "Normalize")
# Padded tokens that are kept at once.
_MAX_PADDED_TOKENS = 16384

Features = dict[str, torch.Tensor]
Step = Callable[[Features, Ragged, torch.Tensor | None], Features]


class OwnChain:
    """Runs a chain that holds modules of the checkpoint's own."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        modules: Sequence[Module],
        pooling_modes: Callable[[Mapping[str, Any]], tuple[str, ...]],
        device: torch.device,
    ) -> None:
        """Runs code of the checkpoint: the caller has made sure that it is trusted.

        Raises CheckpointError.
        """
        self.steps = [_step(checkpoint, module, pooling_modes, device) for module in modules]

    def __call__(self, hidden: Ragged, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """hidden [t, h], input_ids [t] -> float32 [n, d]."""
        parts = hidden.split()
        ids = torch.split(inputs[INPUT_IDS].to(hidden.values.device).long(), hidden.lengths.tolist())
        prompts = inputs.get(PROMPT_LENGTH)
        rows: list[torch.Tensor | None] = [None] * len(parts)
        for order in cut_by_budget(hidden.lengths, _MAX_PADDED_TOKENS, is_padded=True):
            batch = Ragged.pack([parts[i].float() for i in order])
            features = _pad(batch, [ids[i] for i in order])
            for step in self.steps:
                features = step(
                    features, batch, None if prompts is None else prompts[torch.from_numpy(order)]
                )
            if _SENTENCE not in features:
                raise ValueError(f"the checkpoint's own modules made no {_SENTENCE}")
            for i, row in zip(order, features[_SENTENCE].float(), strict=True):
                rows[i] = row
        return torch.stack([row for row in rows if row is not None])


def _pad(batch: Ragged, ids: Sequence[torch.Tensor]) -> Features:
    lengths = torch.from_numpy(batch.lengths).to(batch.values.device)
    mask = torch.arange(batch.max_length, device=lengths.device)[None] < lengths[:, None]
    return {
        "input_lengths": lengths,
        "input_ids": torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True),
        "attention_mask": mask.long(),
        _TOKENS: torch.nn.utils.rnn.pad_sequence(batch.split(), batch_first=True),
    }


def _step(
    checkpoint: Checkpoint,
    module: Module,
    pooling_modes: Callable[[Mapping[str, Any]], tuple[str, ...]],
    device: torch.device,
) -> Step:
    if module.code is not None:
        return _own_step(load_own_module(checkpoint, module, device))
    if module.kind == "Pooling":
        pooling = Pooling(pooling_modes(module.config))

        def pool(features: Features, batch: Ragged, prompt_length: torch.Tensor | None) -> Features:
            # A module before may have changed the tokens.
            tokens = features[_TOKENS][features["attention_mask"].bool()]
            return {**features, _SENTENCE: pooling(Ragged(tokens, batch.lengths), prompt_length)}

        return pool
    if module.kind not in _LINKS:
        raise CheckpointError(
            f"{checkpoint.path}/modules.json holds the module {module.kind}, which is not served; beside its "
            f"own classes there may be Pooling, {', '.join(_LINKS)}"
        )
    link = load_link(module, device)

    def apply(features: Features, batch: Ragged, prompt_length: torch.Tensor | None) -> Features:
        return {**features, _SENTENCE: link(features[_SENTENCE].float())}

    return apply


def _own_step(loaded: torch.nn.Module) -> Step:
    wanted = loaded.forward_args() if hasattr(loaded, "forward_args") else _FEATURES  # type: ignore[operator]
    unknown = [name for name in wanted if name not in _FEATURES]
    if unknown:
        raise CheckpointError(
            f"{type(loaded).__name__} wants {unknown[0]}, which is not given to modules; they may have "
            f"{', '.join(_FEATURES)}"
        )

    def run(features: Features, batch: Ragged, prompt_length: torch.Tensor | None) -> Features:
        given = {name: features[name] for name in wanted if name in features}
        return {**features, **loaded(given)}

    return run


def load_own_module(checkpoint: Checkpoint, module: Module, device: torch.device) -> torch.nn.Module:
    """An instance of the class that a module names. Raises CheckpointError for code that fails.

    Its file may import others that lie beside it, relatively (as transformers wants it) or by their bare
    names (as RTP-LLM does).
    """
    assert module.code is not None
    folder = str(checkpoint.path)
    if folder not in sys.path:
        sys.path.append(folder)
    package = types.ModuleType(f"checkpoint_{abs(hash(folder))}")
    package.__path__ = [folder]
    sys.modules.setdefault(package.__name__, package)
    name = ".".join(module.code.relative_to(checkpoint.path).with_suffix("").parts)
    try:
        code = importlib.import_module(f"{package.__name__}.{name}")
        loaded = getattr(code, module.kind).load(str(module.path))
    except Exception as error:  # it is anybody's code, which may fail in any way
        raise CheckpointError(
            f"{module.code}: {module.kind} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(loaded, torch.nn.Module):
        raise CheckpointError(f"{module.code}: {module.kind}.load gave no torch.nn.Module")
    return loaded.to(device).float().eval().requires_grad_(False)
