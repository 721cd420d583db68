"""The heads that turn hidden states into answers. One file each; a new head is a file and a line here."""

from __future__ import annotations

from backends.heads import colbert, dense, logits, sparse, tokens
from backends.heads.base import HeadSpec

HEADS: dict[str, HeadSpec] = {
    "dense": dense.HEAD,
    "sparse": sparse.HEAD,
    "colbert": colbert.HEAD,
    "logits": logits.HEAD,
    "tokens": tokens.HEAD,
}
