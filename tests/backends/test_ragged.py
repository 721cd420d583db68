import numpy as np
import pytest
import torch

from backends.ragged import Ragged, cut_by_budget, positions


def test_packs_and_splits():
    rows = [torch.arange(3), torch.arange(1), torch.arange(4)]
    batch = Ragged.pack(rows)
    assert batch.values.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.segments.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert batch.positions.tolist() == batch.values.tolist()
    assert batch.max_length == 4
    assert all(torch.equal(a, b) for a, b in zip(batch.split(), rows, strict=True))


def test_refuses_lengths_that_do_not_add_up():
    with pytest.raises(ValueError, match="lengths add up to 5, but there are 4 values"):
        Ragged(torch.zeros(4), np.array([2, 3]))


def test_positions_restart():
    assert positions(np.array([2, 0, 3])).tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("budget", [1, 5, 7, 10, 100])
def test_cuts_keep_every_sequence_once_and_the_budget(budget):
    lengths = np.array([3, 7, 1, 7, 2, 12])
    parts = list(cut_by_budget(lengths, budget))
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    for part in parts:
        assert lengths[part].sum() <= budget or len(part) == 1
    ordered = lengths[np.concatenate(parts)]
    assert (np.diff(ordered) <= 0).all(), "longest first"


def test_cuts_nothing_into_nothing():
    assert list(cut_by_budget(np.array([], np.int64), 5)) == []
