"""The heads that turn hidden states into answers. One file each; a new head is a file and a line here."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from backends.checkpoint import Checkpoint
from backends.contract import FIRST_LENGTH, KEY_LENGTH
from backends.heads import colbert, dense, logits, sparse, tokens
from backends.heads.base import HeadSpec
from backends.late_interaction import LateInteraction, late_interaction_of

HEADS: dict[str, HeadSpec] = {
    "dense": dense.HEAD,
    "sparse": sparse.HEAD,
    "colbert": colbert.HEAD,
    "logits": logits.HEAD,
    "tokens": tokens.HEAD,
}


def takes_pairs(heads: Iterable[str]) -> bool:
    """Whether a text may be a pair of texts for any of the heads."""
    return any(HEADS[head].takes_pairs for head in heads)


def only_row(checkpoint: Checkpoint, heads: Iterable[str]) -> str | None:
    """The one token of each sequence that all the heads read (backends.last_token); None where one
    reads more.
    """
    rows = {HEADS[head].row(checkpoint) for head in heads}
    return rows.pop() if len(rows) == 1 else None


def late_interaction(checkpoint: Checkpoint, heads: Collection[str]) -> LateInteraction | None:
    """What the tokenizer and the encoder must know where the ColBERT head is served."""
    return late_interaction_of(checkpoint) if "colbert" in heads else None


def head_inputs(checkpoint: Checkpoint, heads: Collection[str]) -> tuple[str, ...]:
    """What the heads read besides hidden states and lengths."""
    if only_row(checkpoint, heads) is not None:
        return ()
    return tuple(dict.fromkeys(name for head in heads for name in HEADS[head].inputs(checkpoint)))


def encoder_inputs(
    checkpoint: Checkpoint, heads: Collection[str], *, tells_pairs_apart: bool
) -> tuple[str, ...]:
    """What the encoder reads of each sequence besides its tokens."""
    late = late_interaction(checkpoint, heads)
    keys = (KEY_LENGTH,) if late is not None and late.has_blind_tokens else ()
    return (*keys, FIRST_LENGTH) if tells_pairs_apart and takes_pairs(heads) else keys
