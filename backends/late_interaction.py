"""How a checkpoint makes one vector for each token: what its files say, in the layouts that people publish.

BGE-M3 (colbert_linear.pt), Stanford's ColBERT (a `linear.weight` among the model's own weights, and
artifact.metadata), PyLate up to 3 (a chain of Dense modules, the rest in config_sentence_transformers.json)
and sentence-transformers 6 (MultiVectorEncoder, everything in its modules). All but BGE-M3 encode queries and
documents differently.

*Source:* sentence-transformers 6.2 multi_vector_encoder/model.py and base/modules/transformer.py;
FlagEmbedding 1.4.2 for BGE-M3.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.checkpoint import Checkpoint, Module
from backends.errors import CheckpointError
from backends.json_file import read_json

PUNCTUATION = tuple(string.punctuation)
_TOKENS = "token_embeddings"
# The default of the original ColBERT, and of everybody since.
_QUERY_LENGTH = 32


@dataclass(frozen=True)
class Expansion:
    """Tokens behind a query that have vectors of their own: they ask for words that the query lacks."""

    length: int
    """Tokens of a query that is expanded."""
    attends: bool
    """Whether the others look at them."""
    is_fixed: bool
    """Whether a longer query is over the limit, too."""
    token: str | None = None
    """None is the tokenizer's mask token."""


@dataclass(frozen=True)
class LateInteraction:
    """What is to be done to hidden states, and before that to texts of either role."""

    layout: str
    """bge_m3, stanford, pylate or sentence_transformers."""
    links: tuple[Module, ...] = ()
    """Dense and LayerNorm modules over tokens."""
    weights: Path | None = None
    """The projection of the layouts that have no module for it."""
    drops_first: bool = False
    """Whether the first token ([CLS]) has no vector."""
    normalizes: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    """By role."""
    lengths: Mapping[str, int] = field(default_factory=dict)
    """Tokens of a text by role, where they are fewer than the model's."""
    expansion: Expansion | None = None
    skip_words: tuple[str, ...] = ()
    """Tokens without a vector."""
    skip_roles: tuple[str, ...] = ("document",)
    marks: tuple[str, ...] = ()
    """Prompts that are one token of the vocabulary, whatever a normaliser would make of them."""

    @property
    def has_roles(self) -> bool:
        """Whether queries and documents are encoded differently."""
        return self.layout != "bge_m3"

    @property
    def has_blind_tokens(self) -> bool:
        """Whether some tokens are not looked at by the others."""
        return self.expansion is not None and not self.expansion.attends

    def size(self, hidden_size: int) -> int | None:
        """Components of a vector, where the small files tell."""
        if self.weights is not None:
            return None
        sizes = [int(m.config["out_features"]) for m in self.links if m.kind == "Dense"]
        return sizes[-1] if sizes else hidden_size


def late_interaction_of(checkpoint: Checkpoint) -> LateInteraction | None:
    """None for a checkpoint without. Raises CheckpointError for one that cannot be served right."""
    projection = checkpoint.side_file("colbert_linear")
    if projection is not None:
        return LateInteraction("bge_m3", weights=projection, drops_first=True)
    # A repository may hold several layouts: modules.json is looked at first, as sentence-transformers does.
    if checkpoint.has_modules and checkpoint.sentence_model_type == "ColBERT":
        return _pylate(checkpoint)
    is_chain = any(module.kind == "MultiVectorMask" for module in checkpoint.modules)
    if is_chain or (checkpoint.has_modules and checkpoint.sentence_model_type == "MultiVectorEncoder"):
        return _sentence_transformers(checkpoint)
    return _stanford(checkpoint) if "HF_ColBERT" in checkpoint.architecture else None


def _stanford(checkpoint: Checkpoint) -> LateInteraction:
    metadata = read_json(checkpoint.path / "artifact.metadata")
    marks = {
        "query": f"{metadata.get('query_token_id') or '[unused0]'} ",
        "document": f"{metadata.get('doc_token_id') or '[unused1]'} ",
    }
    length = metadata.get("doc_maxlen")
    return LateInteraction(
        "stanford",
        weights=checkpoint.transformer_path,
        prompts=marks,
        lengths={} if length is None else {"document": int(length)},
        expansion=Expansion(
            int(metadata.get("query_maxlen") or _QUERY_LENGTH),
            bool(metadata.get("attend_to_mask_tokens")),
            is_fixed=True,
        ),
        skip_words=PUNCTUATION if metadata.get("mask_punctuation", True) else (),
        marks=tuple(marks.values()),
    )


def _pylate(checkpoint: Checkpoint) -> LateInteraction:
    config = checkpoint.sentence_config
    prompts: dict[str, str] = {}
    marks = []
    for role in ("query", "document"):
        own = str((config.get("prompts") or {}).get(role) or "")
        mark = str(config.get(f"{role}_prefix") or "")
        prompts[role] = mark + own.removeprefix(mark)
        marks.append(mark)
    skipped = config.get("skiplist_words")
    return LateInteraction(
        "pylate",
        links=_links(checkpoint),
        prompts=prompts,
        lengths=_lengths(config),
        expansion=_pylate_expansion(config),
        skip_words=PUNCTUATION if skipped is None else tuple(skipped),
        marks=tuple(mark for mark in marks if mark),
    )


def _pylate_expansion(config: Mapping[str, Any]) -> Expansion | None:
    if "query_expansion" in config:
        return _expansion(config["query_expansion"])
    if config.get("do_query_expansion") is False:
        return None
    attends = config.get("attend_to_expansion_tokens", config.get("attend_to_mask_tokens"))
    return Expansion(int(config.get("query_length") or _QUERY_LENGTH), bool(attends), is_fixed=True)


def _sentence_transformers(checkpoint: Checkpoint) -> LateInteraction:
    transformer = checkpoint.transformer_config
    masks = [module.config for module in checkpoint.modules if module.kind == "MultiVectorMask"]
    mask: Mapping[str, Any] = masks[0] if masks else {}
    if mask.get("keep_only_token_ids"):
        raise CheckpointError(f"{checkpoint.path}: a MultiVectorMask with keep_only_token_ids is not served")
    roles = mask.get("skiplist_tasks") or ("document",)
    return LateInteraction(
        "sentence_transformers",
        links=_links(checkpoint),
        normalizes=any(module.kind == "Normalize" for module in checkpoint.modules),
        prompts=checkpoint.role_prompts,
        lengths=_lengths(transformer),
        expansion=_expansion(transformer.get("query_expansion")),
        skip_words=tuple(mask.get("skiplist_words") or ()),
        skip_roles=(roles,) if isinstance(roles, str) else tuple(roles),
    )


def _lengths(config: Mapping[str, Any]) -> dict[str, int]:
    named = {role: config.get(f"{role}_length") for role in ("query", "document")}
    return {role: int(length) for role, length in named.items() if length is not None}


def _expansion(config: Mapping[str, Any] | None) -> Expansion | None:
    if config is None:
        return None
    return Expansion(
        int(config["length"]),
        bool(config.get("attend", False)),
        config.get("strategy") == "fixed",
        config.get("token"),
    )


def _links(checkpoint: Checkpoint) -> tuple[Module, ...]:
    """The modules between the transformer and the mask, which all work on tokens."""
    links = []
    for module in checkpoint.modules:
        if module.kind in ("MultiVectorMask", "Normalize") and module.code is None:
            continue
        if module.kind not in ("Dense", "LayerNorm") or module.code is not None:
            raise CheckpointError(
                f"{checkpoint.path}/modules.json holds the module {module.kind}, which is not served; behind "
                "the Transformer of a late interaction model there may be Dense, LayerNorm, MultiVectorMask "
                "and Normalize"
            )
        where = module.config.get("module_input_name") or _TOKENS
        if where != _TOKENS:
            raise CheckpointError(
                f"{module.path}/config.json: module_input_name is {where!r}; only {_TOKENS} is served"
            )
        links.append(module)
    return tuple(links)
