import numpy as np
import pytest
import torch

from kernels.attention_plan import (
    BLOCKS,
    FixedPlans,
    LastPlan,
    choose_block,
    count_blocks,
    make_plan,
    most_blocks,
)
from kernels.varlen_attention import varlen_attention
from tests.kernels.conftest import DEVICE


def test_the_longest_blocks_come_first_and_cover_every_token_once():
    lengths = np.array([5, 40, 0, 16])
    plan = make_plan(lengths, prefixes=[(), (), (), ((0, 5), (5, 45))], device=DEVICE, max_block=16)
    table = plan.table.cpu()
    blocks = table[: 5 * plan.n_blocks].view(-1, 5)
    assert blocks[:, :3].tolist() == [[45, 61, 45], [5, 45, 0], [21, 45, 16], [37, 45, 32], [0, 5, 0]]
    behind = blocks[0]
    assert behind[4] == 3
    assert table[behind[3] : behind[3] + 9].view(3, 3).tolist() == [[0, 5, 0], [5, 40, 5], [45, 16, 45]]
    causal = make_plan([40], device=DEVICE, causal=True, max_block=16).table.cpu()
    assert causal[:15].view(3, 5)[:, 0].tolist() == [32, 16, 0]


def test_blocks_fit_the_lengths():
    assert [choose_block(np.array([n] * 3), 128) for n in (8, 30, 64, 100, 500)] == [
        16,
        32,
        64,
        128,
        128,
    ]
    assert choose_block(np.array([2000, *[20] * 3]), 128) == 128, "few short ones do not matter"
    assert choose_block(np.array([500]), 32) == 32


def test_layers_of_one_pass_share_a_plan():
    plans = LastPlan()
    lengths = [3, 4]
    given = {"device": DEVICE, "causal": False, "max_block": 128}
    plan = plans.get((lengths, None, None), **given)
    assert plans.get((lengths, None, None), **given) is plan
    assert plans.get(([3, 4], None, None), **given) is not plan
    assert plans.get((lengths, None, None), **given | {"causal": True}) is not plan


def fixed(n_tokens, lengths, *, causal=False, max_block=16):
    plans = FixedPlans(n_tokens)
    plans.fill(lengths)
    return plans, plans.get((None, None, None), device=DEVICE, causal=causal, max_block=max_block)


def test_a_plan_of_fixed_size_holds_the_plan_and_empty_blocks():
    plans, plan = fixed(64, [5, 20])
    assert (plan.n_blocks, plan.block, plan.n_tokens, len(plan.table)) == (8, 16, 64, 67)
    blocks, ranges = plan.table[:40].view(8, 5).tolist(), plan.table[40:].view(9, 3).tolist()
    assert blocks == [[5, 25, 0, 43, 1], [21, 25, 16, 43, 1], [0, 5, 0, 40, 1]] + [[0, 0, 0, 64, 1]] * 5
    assert ranges == [[0, 5, 0], [5, 20, 0]] + [[0, 0, 0]] * 7
    place = plan.table.data_ptr()
    plans.fill([3])
    assert plan.table[:10].tolist() == [0, 3, 0, 40, 1, 0, 0, 0, 64, 1]
    assert plans.get((None, None, None), device=DEVICE, causal=False, max_block=16) is plan
    assert plan.table.data_ptr() == place


def test_a_plan_of_fixed_size_refuses_what_does_not_fit():
    plans, _ = fixed(64, [60], max_block=128)
    with pytest.raises(ValueError, match="need blocks of 16, the plan has blocks of 64"):
        plans.fill([5])
    for lengths, reason in [([1] * 9, "9 blocks of 9 tokens do not fit 8 of 64"), ([65], "of 65 tokens")]:
        with pytest.raises(ValueError, match=reason):
            fixed(64, lengths)


def test_what_fits_by_the_largest_block_fits_by_smaller_ones():
    """Layers of one pass may have several limits, of which those who choose the size know nothing."""
    generator = np.random.default_rng(1)
    for _ in range(300):
        lengths = generator.integers(1, generator.integers(2, 300), generator.integers(1, 12))
        n_tokens = max(128, 1 << int(lengths.sum() - 1).bit_length())
        largest = choose_block(lengths, 128)
        fits = count_blocks(lengths, largest) <= most_blocks(n_tokens, largest)
        assert fits or largest == 16
        for block in BLOCKS:
            assert choose_block(lengths, block) == min(block, largest)
            assert not fits or count_blocks(lengths, min(block, largest)) <= most_blocks(
                n_tokens, min(block, largest)
            )


class Memory:
    """Addresses that interpreted kernels read and write."""

    def __init__(self, plain):
        self.plain = plain
        self.read, self.written = [], []

    def load(self, pointers, mask, *rest):
        self.read.append(np.unique(pointers[mask]))
        return self.plain.load(pointers, mask, *rest)

    def store(self, pointers, values, mask):
        self.written.extend(pointers[mask].ravel().tolist())
        return self.plain.store(pointers, values, mask)

    def read_outside(self, table):
        start = table.data_ptr()
        return {place for place in np.concatenate(self.read) if not start <= place < start + table.nbytes}


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 4}])
def test_empty_blocks_and_tokens_of_no_sequence_are_not_touched(options, monkeypatch):
    torch.manual_seed(0)
    lengths, count = [18, 3], 21
    q, k, v = torch.randn(64, 3, 16, device=DEVICE).split(1, 1)
    # Whoever looked at them would give no number.
    q[count:], k[count:], v[count:] = (float("nan"),) * 3
    own = make_plan(lengths, device=DEVICE, causal=options.get("causal", False), max_block=16)
    _, padded = fixed(64, lengths, causal=options.get("causal", False))
    monkeypatch.setattr(torch, "empty", lambda shape, **facts: torch.full(shape, 7.0, **facts))
    results, memories = [], []
    for plan, rows in ((own, count), (padded, 64)):
        with monkeypatch.context() as patch:
            if DEVICE.type == "cpu":
                from triton.runtime import interpreter

                memories.append(Memory(interpreter._interpreter))
                patch.setattr(interpreter, "_interpreter", memories[-1])
            results.append(varlen_attention(q[:rows], k[:rows], v[:rows], plan, block_keys=16, **options))
    expected, got = results
    assert torch.equal(got[:count], expected)
    assert (got[count:] == 7).all()
    if memories:
        alone, filled = memories
        assert filled.read_outside(padded.table) == alone.read_outside(own.table)
        assert len(filled.written) == len(set(filled.written)) == count * 16


def test_refusals():
    with pytest.raises(ValueError, match="between 0 and its length"):
        make_plan([4], [5], device=DEVICE)
    with pytest.raises(ValueError, match="beyond the 4 tokens"):
        make_plan([4], prefixes=[((3, 6),)], device=DEVICE)
    with pytest.raises(ValueError, match="1 prefixes for 2 sequences"):
        make_plan([2, 2], prefixes=[()], device=DEVICE)
