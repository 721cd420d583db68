import random

import pytest
import torch

from kernels.max_sim import max_sim, max_sim_reference
from tests.kernels.conftest import DEVICE, HALF


def vectors(total, size, dtype=torch.float32):
    """Of unit length, as every model of this kind makes them."""
    return torch.nn.functional.normalize(torch.randn(total, size, device=DEVICE), dim=-1).to(dtype)


def compare(queries, query_lengths, documents, document_lengths, pairs=None, **options):
    given = (query_lengths, documents.double(), document_lengths, pairs)
    expected = max_sim_reference(queries.double(), *given, **options)
    got = max_sim(queries, query_lengths, documents, document_lengths, pairs, **options)
    assert got.dtype == torch.float32
    # Products of half precision are exact in float32: only the order of the sums differs.
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    return got


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("size", [32, 72, 96, 128, 200])
def test_every_query_with_every_document(size, dtype):
    torch.manual_seed(0)
    queries, documents = vectors(36, size, dtype), vectors(77, size, dtype)
    got = compare(queries, [32, 4], documents, [70, 1, 6])
    assert got.shape == (2, 3)
    shifted = max_sim_reference(queries, [32, 4], documents, [69, 2, 6])
    assert (got - shifted).abs().max() > 1e-3, "a lost boundary must show"


def test_what_only_differs_from_zero_in_sign():
    """Empty places of a block must not count as products of 0."""
    queries = vectors(3, 16)
    got = compare(queries, [3], -queries[:2], [2])
    assert got.item() < 0


def test_long_queries_and_the_mean():
    torch.manual_seed(0)
    queries, documents = vectors(75, 16), vectors(40, 16)
    mean = compare(queries, [70, 5], documents, [40], is_mean=True)
    assert (compare(queries, [70, 5], documents, [40]) - mean).abs().max() > 1


def test_pairs():
    torch.manual_seed(0)
    queries, documents = vectors(9, 16), vectors(20, 16)
    pairs = [(1, 2), (0, 0), (1, 1), (1, 2)]
    got = compare(queries, [4, 5], documents, [3, 10, 7], pairs)
    whole = max_sim(queries, [4, 5], documents, [3, 10, 7])
    assert torch.equal(got, torch.stack([whole[pair] for pair in pairs]))
    assert max_sim(queries, [9], documents, [20], []).shape == (0,)


def test_random_batches_with_empty_ones():
    generator = random.Random(6)
    torch.manual_seed(6)
    for _ in range(6):
        sizes = [[generator.choice([0, 1, 16, 17, 33]) for _ in range(2)] for _ in range(2)]
        width = generator.choice([1, 17, 64])
        # Rows that lie apart.
        queries, documents = (vectors(sum(lengths), width + 5)[:, 5:] for lengths in sizes)
        got = compare(queries, sizes[0], documents, sizes[1], is_mean=generator.random() < 0.5)
        for i, j in ((i, j) for i in range(2) for j in range(2)):
            assert (sizes[0][i] and sizes[1][j]) or got[i, j] == 0


def test_refusals():
    x = vectors(4, 8)
    for given, reason in [
        ((x, [4], x[:, :7], [4]), "documents"),
        ((x, [4], x.double(), [4]), "need one format"),
        ((x, [4], x.half(), [4]), "need one format"),
        ((x, [4], x.t().contiguous().t(), [4]), "side by side"),
        ((x, [3], x, [4]), "there are 4 rows"),
        ((x, [4], x, [4], [(0, 1)]), "not of the 1 queries and 1 documents"),
    ]:
        with pytest.raises(ValueError, match=reason):
            max_sim(*given)
