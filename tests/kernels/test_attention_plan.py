import numpy as np
import pytest

from kernels.attention_plan import LastPlan, choose_block, make_plan
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


def test_refusals():
    with pytest.raises(ValueError, match="between 0 and its length"):
        make_plan([4], [5], device=DEVICE)
    with pytest.raises(ValueError, match="beyond the 4 tokens"):
        make_plan([4], prefixes=[((3, 6),)], device=DEVICE)
    with pytest.raises(ValueError, match="1 prefixes for 2 sequences"):
        make_plan([2, 2], prefixes=[()], device=DEVICE)
