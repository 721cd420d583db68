"""Scores between the texts of two sides, by what a model has made of them.

*Source:* FlagEmbedding 1.4.2 compute_score for all four; RTP-LLM has the same for the first three.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gateway.batches import Array
from gateway.tasks import Representations, SparseVector

# Numbers of one block of products between tokens: 32 MB.
_BLOCK = 8 * 2**20


def dense_scores(left: Array, right: Array) -> Array:
    """[a, d], [b, d] -> dot products [a, b]."""
    scores: Array = left @ right.T
    return scores


def cosine_scores(left: Array, right: Array) -> Array:
    """[a, d], [b, d] -> cosines [a, b]."""
    return dense_scores(
        *(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (left, right))
    )


def sparse_scores(left: Sequence[SparseVector], right: Sequence[SparseVector]) -> Array:
    """Sums over shared tokens of the products of their weights, [a, b]."""
    counts = [len(vector.indices) for vector in right]
    rows = np.repeat(np.arange(len(right)), counts)
    tokens = np.concatenate([vector.indices for vector in right])
    weights = np.concatenate([vector.weights for vector in right])
    order = np.argsort(tokens, kind="stable")
    rows, tokens, weights = rows[order], tokens[order], weights[order]
    scores = np.zeros((len(left), len(right)), np.float32)
    for i, vector in enumerate(left):
        begin = np.searchsorted(tokens, vector.indices, "left")
        sizes = np.searchsorted(tokens, vector.indices, "right") - begin
        # The places in the right side of every token of this vector, end to end.
        inner = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        places = np.repeat(begin, sizes) + inner
        np.add.at(scores[i], rows[places], np.repeat(vector.weights, sizes) * weights[places])
    return scores


def colbert_scores(left: Sequence[Array], right: Sequence[Array]) -> Array:
    """Mean over the left tokens of their best product with a right token, [a, b]; 0 where a side has
    no tokens.
    """
    scores = np.zeros((len(left), len(right)), np.float32)
    filled = [j for j, vectors in enumerate(right) if len(vectors)]
    if not filled:
        return scores
    stacked = np.concatenate([right[j] for j in filled])
    starts = np.cumsum([0, *(len(right[j]) for j in filled[:-1])])
    step = max(1, _BLOCK // len(stacked))
    for i, vectors in enumerate(left):
        best = np.zeros(len(filled), np.float32)
        for first in range(0, len(vectors), step):
            products = vectors[first : first + step] @ stacked.T
            best += np.maximum.reduceat(products, starts, axis=1).sum(0)
        if len(vectors):
            scores[i, filled] = best / len(vectors)
    return scores


def count_products(left: Representations, right: Representations) -> int:
    """Multiplications that the scores take, nearly."""
    count = 0
    if left.dense is not None and right.dense is not None:
        count += len(left.dense) * len(right.dense) * left.dense.shape[1]
    if left.colbert and right.colbert:
        size = left.colbert[0].shape[1]
        count += sum(map(len, left.colbert)) * sum(map(len, right.colbert)) * size
    if left.sparse and right.sparse:
        # A token of the left meets at most every text of the right.
        count += sum(len(vector.indices) for vector in left.sparse) * len(right.sparse)
    return count


def mixed_scores(left: Representations, right: Representations, weights: Mapping[str, float]) -> Array:
    """The weighted mean of the kinds that have a weight, [a, b]: dense, sparse, colbert."""
    total = sum(weights.values())
    scores = np.zeros((len(left.n_tokens), len(right.n_tokens)), np.float32)
    for kind, weight in weights.items():
        scores += np.float32(weight / total) * kind_scores(left, right, kind)
    return scores


def kind_scores(left: Representations, right: Representations, kind: str) -> Array:
    """dense, sparse or colbert scores [a, b] of representations that hold that kind."""
    if kind == "dense":
        assert left.dense is not None
        assert right.dense is not None
        return dense_scores(left.dense, right.dense)
    if kind == "sparse":
        assert left.sparse is not None
        assert right.sparse is not None
        return sparse_scores(left.sparse, right.sparse)
    assert left.colbert is not None
    assert right.colbert is not None
    return colbert_scores(left.colbert, right.colbert)
