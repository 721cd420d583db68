"""Late interaction: how well the token vectors of a document answer those of a query.

score(q, d) = sum over the vectors of q of the largest product with a vector of d. One program for a pair; the
matrix of products stays in registers.

*Source:* Khattab and Zaharia 2020 (ColBERT); FlagEmbedding 1.4.2 (BGE-M3) has the mean over the query instead
of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import no_type_check

import numpy as np
import numpy.typing as npt
import torch

from kernels.language import check_rows, jit, launch, offsets_of, power_of_two, tl
from kernels.transfer import to_device

_FORMATS = (torch.bfloat16, torch.float16, torch.float32)


@jit
@no_type_check
def _max_sim_kernel(
    QUERIES, DOCUMENTS, TABLE, OUT, query_stride, document_stride, SIZE: tl.constexpr,
    IS_MEAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """TABLE has of every pair where its query and its document begin and how many vectors they have, and the
    place of its score.
    """
    pair = TABLE + tl.program_id(0) * 5
    queries = QUERIES + tl.load(pair).to(tl.int64) * query_stride
    n_queries = tl.load(pair + 1)
    documents = DOCUMENTS + tl.load(pair + 2).to(tl.int64) * document_stride
    n_documents = tl.load(pair + 3)
    parts = tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_M], tl.float32)
    for m in range(0, n_queries, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        for n in range(0, n_documents, BLOCK_N):
            columns = n + tl.arange(0, BLOCK_N)
            products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for d in range(0, SIZE, BLOCK_K):
                is_part = (d + parts < SIZE)[None, :]
                query = tl.load(
                    queries + rows[:, None] * query_stride + (d + parts)[None, :],
                    mask=(rows < n_queries)[:, None] & is_part,
                    other=0.0,
                )
                document = tl.load(
                    documents + columns[:, None] * document_stride + (d + parts)[None, :],
                    mask=(columns < n_documents)[:, None] & is_part,
                    other=0.0,
                )
                # float32 is exact, not TF32; it says nothing to the smaller formats.
                products = tl.dot(query, tl.trans(document), products, input_precision="ieee")
            products = tl.where((columns < n_documents)[None, :], products, float("-inf"))
            largest = tl.maximum(largest, tl.max(products, 1))
        # Also what a document without vectors gives: nothing, and not an infinity.
        sums += tl.where((rows < n_queries) & (largest > float("-inf")), largest, 0.0)
    score = tl.sum(sums, 0)
    if IS_MEAN:
        score = score / tl.maximum(n_queries, 1).to(tl.float32)
    tl.store(OUT + tl.load(pair + 4), score)


def max_sim(
    queries: torch.Tensor,
    query_lengths: Sequence[int],
    documents: torch.Tensor,
    document_lengths: Sequence[int],
    pairs: Sequence[tuple[int, int]] | None = None,
    *,
    is_mean: bool = False,
) -> torch.Tensor:
    """Vectors [a, d] of n queries and [u, d] of m documents, end to end, lengths on the host -> float32
    [n, m], or [k] for `pairs` [k] of a query and a document.

    `is_mean` divides by the number of a query's vectors. Without vectors a score is 0. Raises ValueError for
    shapes and dtypes that do not fit.
    """
    _check(queries, documents)
    table, shape = _pairs(queries, query_lengths, documents, document_lengths, pairs)
    out = torch.empty(shape, dtype=torch.float32, device=queries.device)
    is_exact = queries.dtype == torch.float32
    longest = int(table[:, 1].max(initial=1))
    launch(
        _max_sim_kernel,
        len(table),
        *(queries, documents, to_device(table, queries.device), out),
        *(queries.stride(0), documents.stride(0)),
        SIZE=queries.shape[1],
        IS_MEAN=is_mean,
        # Queries are short: 32 vectors in most layouts.
        BLOCK_M=16 if longest <= 16 else 32 if longest <= 32 or is_exact else 64,
        BLOCK_N=32 if is_exact else 64,
        BLOCK_K=min(power_of_two(queries.shape[1], least=16), 32 if is_exact else 128),
        num_warps=4,
        num_stages=1 if is_exact else 3,
    )
    return out


def _check(queries: torch.Tensor, documents: torch.Tensor) -> None:
    check_rows(queries=queries, documents=documents)
    if queries.shape[1] != documents.shape[1]:
        raise ValueError(f"queries are {list(queries.shape)} and documents {list(documents.shape)}")
    if queries.dtype != documents.dtype or queries.dtype not in _FORMATS:
        raise ValueError(f"vectors are {queries.dtype} and {documents.dtype}; they need one format")


def _pairs(
    queries: torch.Tensor,
    query_lengths: Sequence[int],
    documents: torch.Tensor,
    document_lengths: Sequence[int],
    pairs: Sequence[tuple[int, int]] | None,
) -> tuple[npt.NDArray[np.int32], tuple[int, ...]]:
    """int32 [k, 5] of all pairs, those with the longest documents first, and the shape of their scores."""
    of_queries = offsets_of(query_lengths, len(queries))
    of_documents = offsets_of(document_lengths, len(documents))
    n, m = len(of_queries) - 1, len(of_documents) - 1
    if pairs is None:
        first, second = np.divmod(np.arange(n * m), max(m, 1))
    else:
        chosen = np.asarray(pairs, np.int64).reshape(-1, 2)
        first, second = chosen[:, 0], chosen[:, 1]
        if (chosen < 0).any() or (first >= n).any() or (second >= m).any():
            raise ValueError(f"a pair is not of the {n} queries and {m} documents")
    n_queries, n_documents = np.diff(of_queries)[first], np.diff(of_documents)[second]
    order = np.argsort(-n_queries.astype(np.int64) * n_documents, kind="stable")
    columns = (of_queries[first], n_queries, of_documents[second], n_documents, np.arange(len(first)))
    table = np.stack(columns, 1)[order].astype(np.int32)
    return np.ascontiguousarray(table), (n, m) if pairs is None else (len(first),)


def max_sim_reference(
    queries: torch.Tensor,
    query_lengths: Sequence[int],
    documents: torch.Tensor,
    document_lengths: Sequence[int],
    pairs: Sequence[tuple[int, int]] | None = None,
    *,
    is_mean: bool = False,
) -> torch.Tensor:
    """As `max_sim`; float64 stays float64."""
    inner = torch.float64 if queries.dtype == torch.float64 else torch.float32
    rows = torch.split(queries.to(inner), list(query_lengths))
    columns = torch.split(documents.to(inner), list(document_lengths))
    n, m = len(rows), len(columns)
    chosen = [(i, j) for i in range(n) for j in range(m)] if pairs is None else pairs
    scores = torch.zeros(len(chosen), dtype=inner, device=queries.device)
    for place, (i, j) in enumerate(chosen):
        if len(rows[i]) and len(columns[j]):
            largest = (rows[i] @ columns[j].T).amax(1)
            scores[place] = largest.mean() if is_mean else largest.sum()
    return scores.view(n, m) if pairs is None else scores
