import random

import numpy as np
import pytest
import torch

from backends.contract import INPUT_IDS
from backends.heads.sparse import Splade, TokenWeights
from backends.ragged import Ragged
from kernels.sparse_max import lexical_weights, lexical_weights_reference, splade, splade_reference
from tests.kernels.conftest import DEVICE, HALF

LENGTHS = [19, 0, 1, 8]


def close(got, expected):
    """The logarithm is another one; everything is float32 whatever comes in."""
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected.double(), atol=1e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("n_logs", [1, 2])
def test_splade(pooling, n_logs, dtype):
    torch.manual_seed(0)
    logits = (3 * torch.randn(sum(LENGTHS), 300, device=DEVICE) - 2).to(dtype)
    got = splade(logits, LENGTHS, pooling=pooling, n_logs=n_logs)
    close(got, splade_reference(logits.double(), LENGTHS, pooling=pooling, n_logs=n_logs))
    assert (got[1] == 0).all()
    for other in (
        splade_reference(logits, [18, 1, 1, 8], pooling=pooling, n_logs=n_logs),
        splade_reference(logits, LENGTHS, pooling=pooling, n_logs=3 - n_logs),
    ):
        assert (got - other).abs().max() > 0.1


def test_small_logits_keep_their_digits():
    logits = torch.tensor([[1e-8, 1e-4, 0.0, -1.0, 1e-6, 3e4]], device=DEVICE)
    got, expected = splade(logits, [1]), logits.relu().double().log1p()
    torch.testing.assert_close(got.double(), expected, atol=0, rtol=1e-6)


def test_the_reference_is_splade_s_head():
    torch.manual_seed(0)
    logits = torch.randn(9, 50)
    segments, indices, weights = Splade(torch.nn.Identity(), "max", "log1p_relu")(
        Ragged(logits, np.array([5, 4])), {}
    )
    expected = torch.zeros(2, 50)
    expected[segments, indices] = weights
    torch.testing.assert_close(splade_reference(logits, [5, 4], n_logs=2), expected)


def lexical_batch(lengths, seed, kind=torch.int64):
    """Few ids, so that most come several times."""
    torch.manual_seed(seed)
    total = sum(lengths)
    weights = torch.randn(total, device=DEVICE)
    ids = torch.randint(0, 12, (total,), device=DEVICE).to(kind)
    return weights, ids, torch.tensor([0, 2, 3], device=DEVICE)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_lexical_weights(kind):
    lengths = [70, 0, 1, 30]
    weights, ids, unused = lexical_batch(lengths, 0, kind)
    got = lexical_weights(weights, ids, lengths, unused)
    assert torch.equal(got, lexical_weights_reference(weights, ids, lengths, unused)), "nothing is computed"
    assert not torch.equal(got, lexical_weights_reference(weights, ids, [69, 1, 1, 30], unused))
    assert not torch.equal(got, lexical_weights_reference(weights, ids, lengths, unused[:1]))
    assert (lexical_weights(weights, ids, lengths, unused[:0]) > 0).sum() > (got > 0).sum()


def test_what_is_left_are_the_triples_of_the_sparse_head():
    lengths = np.array([20, 3, 9])
    weights, ids, unused = (x.cpu() for x in lexical_batch(lengths.tolist(), 1))
    linear = torch.nn.Linear(1, 1).requires_grad_(False)
    linear.weight.fill_(1.0)
    linear.bias.zero_()
    hidden = Ragged(weights[:, None], lengths)
    segments, indices, expected = TokenWeights(linear, unused, 12)(hidden, {INPUT_IDS: ids})
    found = lexical_weights_reference(weights, ids, lengths.tolist(), unused)
    rows = found.nonzero()[:, 0]
    order = (hidden.segments[rows] * 12 + ids[rows]).argsort()
    rows = rows[order]
    assert torch.equal(hidden.segments[rows], segments)
    assert torch.equal(ids[rows], indices)
    assert torch.equal(found[rows], expected)


def test_random_batches():
    generator = random.Random(7)
    for seed in range(5):
        lengths = [generator.choice([0, 1, 8, 63, 65]) for _ in range(generator.randint(0, 3))]
        batch = lexical_batch(lengths, seed)
        got = lexical_weights(*batch[:2], lengths, batch[2])
        assert torch.equal(got, lexical_weights_reference(*batch[:2], lengths, batch[2]))
        # Rows that lie apart.
        logits = torch.randn(sum(lengths), generator.choice([1, 255, 257]) + 3, device=DEVICE)[:, 3:]
        given = {"pooling": generator.choice(["max", "sum"]), "n_logs": generator.choice([1, 2])}
        close(splade(logits, lengths, **given), splade_reference(logits.double(), lengths, **given))


def test_refusals():
    logits = torch.randn(4, 8, device=DEVICE)
    weights, ids, unused = lexical_batch([4], 0)
    for call, reason in [
        (lambda: splade(logits, [3]), "there are 4 rows"),
        (lambda: splade(logits, [4], pooling="mean"), "pooling 'mean'"),
        (lambda: splade(logits, [4], n_logs=0), "0 logarithms"),
        (lambda: splade(logits.t(), [8]), "side by side"),
        (lambda: lexical_weights(weights[:3], ids, [4], unused), "weights are"),
        (lambda: lexical_weights(weights, ids.float(), [4], unused), "ids torch.float32"),
        (lambda: lexical_weights(weights, ids, [5], unused), "there are 4 rows"),
        (lambda: lexical_weights(weights, ids.repeat(2)[::2], [4], unused), "side by side"),
    ]:
        with pytest.raises(ValueError, match=reason):
            call()
