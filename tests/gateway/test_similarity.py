"""Scores against their definitions, written out."""

import numpy as np
import pytest

from gateway import similarity
from gateway.similarity import colbert_scores, cosine_scores, dense_scores, sparse_scores
from gateway.tasks import SparseVector

RANDOM = np.random.default_rng(3)


def sparse(**weights):
    pairs = sorted((int(name[1:]), weight) for name, weight in weights.items())
    return SparseVector(
        np.array([i for i, _ in pairs], np.int32), np.array([w for _, w in pairs], np.float32)
    )


def test_sparse_is_the_sum_over_shared_tokens():
    left = [sparse(t1=2, t5=3), sparse(), sparse(t9=1)]
    right = [sparse(t5=4), sparse(t1=1, t5=1, t7=9), sparse()]
    np.testing.assert_allclose(sparse_scores(left, right), [[12, 5, 0], [0, 0, 0], [0, 0, 0]])


def test_sparse_of_random_vectors():
    def make():
        indices = np.sort(RANDOM.choice(50, RANDOM.integers(0, 30), replace=False)).astype(np.int32)
        return SparseVector(indices, RANDOM.random(len(indices)).astype(np.float32))

    left, right = [make() for _ in range(9)], [make() for _ in range(7)]

    def score(a, b):
        shared = dict(zip(b.indices.tolist(), b.weights.tolist(), strict=True))
        return sum(w * shared.get(i, 0) for i, w in zip(a.indices.tolist(), a.weights.tolist(), strict=True))

    expected = [[score(a, b) for b in right] for a in left]
    np.testing.assert_allclose(sparse_scores(left, right), expected, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 10, 10**6])
def test_colbert_is_the_mean_of_the_best(monkeypatch, block):
    monkeypatch.setattr(similarity, "_BLOCK", block)
    left = [RANDOM.normal(size=(n, 4)).astype(np.float32) for n in (3, 1, 5)]
    right = [RANDOM.normal(size=(n, 4)).astype(np.float32) for n in (2, 6, 1, 4)]
    expected = [[(a @ b.T).max(1).mean() for b in right] for a in left]
    np.testing.assert_allclose(colbert_scores(left, right), expected, rtol=1e-5)
    # Not symmetric: swapping the sides is another score.
    assert np.abs(colbert_scores(right, left).T - expected).max() > 0.01


def test_colbert_without_tokens_is_zero():
    some, none = np.ones((2, 4), np.float32), np.ones((0, 4), np.float32)
    np.testing.assert_allclose(colbert_scores([some, none], [none, some, none]), [[0, 4, 0], [0, 0, 0]])
    np.testing.assert_allclose(colbert_scores([some], [none]), [[0]])


def test_dense_and_cosine():
    left, right = np.array([[3.0, 4.0]], np.float32), np.array([[6.0, 8.0], [0.0, 0.0]], np.float32)
    np.testing.assert_allclose(dense_scores(left, right), [[50, 0]])
    np.testing.assert_allclose(cosine_scores(left, right), [[1, 0]], rtol=1e-6)
