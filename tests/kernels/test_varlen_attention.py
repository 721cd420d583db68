import random

import pytest
import torch

from kernels import attention_plan
from kernels.attention_plan import make_plan
from kernels.packed_attention import packed_attention
from kernels.varlen_attention import varlen_attention, varlen_attention_reference
from tests.kernels.conftest import DEVICE, HALF

# float32: sums of a few hundred products in another order. bfloat16: the weights of the softmax and the
# answer are rounded to 8 bits, so half a part in 256 of values around 1, each; float16 has three more.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
LENGTHS = [37, 1, 0, 20, 5]


def heads_of(total, heads, kv_heads, size, dtype=torch.float32):
    """q, k and v as transformers makes them of a fused projection: tokens are far apart in memory."""
    fused = torch.randn(total, heads + 2 * kv_heads, size, device=DEVICE).to(dtype)
    return fused.split([heads, kv_heads, kv_heads], dim=1)


def compare(q, k, v, lengths, key_lengths=None, prefixes=None, max_block=16, **options):
    """The kernel by small blocks, of which several are needed, against the reference in float64."""
    plan = make_plan(
        lengths,
        key_lengths,
        prefixes,
        device=DEVICE,
        causal=options.get("causal", False),
        max_block=max_block,
    )
    got = varlen_attention(q, k, v, plan, block_keys=16, **options)
    expected = varlen_attention_reference(
        q.double(), k.double(), v.double(), lengths, key_lengths, prefixes, **options
    )
    assert got.shape == q.shape
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCES[q.dtype], rtol=0)
    return got


@pytest.mark.parametrize("causal", [False, True])
# Smaller than a block, over its edge, over several blocks, larger than the longest sequence.
@pytest.mark.parametrize("window", [None, 3, 17, 33, 50])
def test_masks(causal, window):
    torch.manual_seed(0)
    q, k, v = heads_of(sum(LENGTHS), 2, 1, 32)
    got = compare(q, k, v, LENGTHS, causal=causal, window=window)
    wrong = {"causal": causal, "window": window and window + 1}
    if window is None or window > max(LENGTHS):
        wrong = {"causal": not causal}
    other = varlen_attention_reference(q, k, v, LENGTHS, **wrong)
    assert (got - other).abs().max() > 0.1, "a mask that is off by one must show"


@pytest.mark.parametrize("size", [32, 64, 72, 80, 96, 128, 256])
def test_head_dims_and_groups(size):
    torch.manual_seed(0)
    q, k, v = heads_of(21, 4, 2, size)
    got = compare(q, k, v, [18, 3])
    other = varlen_attention_reference(q, k.flip(1), v.flip(1), [18, 3])
    assert (got - other).abs().max() > 0.1, "the wrong group must show"


def test_half_precision_and_the_blocks_of_long_sequences():
    torch.manual_seed(0)
    q, k, v = heads_of(150, 1, 1, 64, HALF)
    compare(q, k, v, [140, 10], max_block=128)
    plan = make_plan([140, 10], device=DEVICE)
    expected = varlen_attention_reference(q.double(), k.double(), v.double(), [140, 10])
    got = varlen_attention(q, k, v, plan)
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCES[q.dtype], rtol=0)


def test_softcap_and_scaling():
    torch.manual_seed(0)
    q, k, v = heads_of(20, 2, 2, 32)
    got = compare(3 * q, k, v, [20], softcap=2.0, scaling=0.3, causal=True)
    other = varlen_attention_reference(3 * q, k, v, [20], scaling=0.3, causal=True)
    assert (got - other).abs().max() > 0.1


def test_huge_scores_stay_numbers():
    torch.manual_seed(0)
    q, k, v = heads_of(20, 1, 1, 32)
    compare(300 * q, k, v, [20])
    compare(300 * q, k, v, [20], softcap=30.0)


@pytest.mark.parametrize("window", [None, 4])
def test_tokens_that_nobody_looks_at(window):
    torch.manual_seed(0)
    q, k, v = heads_of(sum(LENGTHS), 1, 1, 32)
    got = compare(q, k, v, LENGTHS, [30, 1, 0, 2, 0], window=window)
    assert (got[-5:] == 0).all(), "a sequence of which nothing is seen gets zeros"
    assert (got - varlen_attention_reference(q, k, v, LENGTHS, window=window)).abs().max() > 0.1


# A system prompt, two texts that go on from it, and one that goes on from the first of those.
TREE = [18, 7, 20, 5, 3]
PREFIXES = [(), ((0, 18),), ((0, 18),), ((0, 18), (18, 25)), ()]


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 9), (False, None), (False, 9)])
def test_prefixes(causal, window):
    torch.manual_seed(0)
    q, k, v = heads_of(sum(TREE), 2, 1, 32)
    got = compare(q, k, v, TREE, [18, 7, 20, 4, 3], PREFIXES, causal=causal, window=window)
    packed, _ = packed_attention(
        torch.nn.Module(),
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        None,
        is_causal=causal,
        sliding_window=window,
        sequence_lengths=TREE,
        key_lengths=[18, 7, 20, 4, 3],
        prefixes=PREFIXES,
    )
    torch.testing.assert_close(got, packed[0], atol=1e-5, rtol=0)
    other = varlen_attention_reference(q, k, v, TREE, causal=causal, window=window)
    assert (got - other).abs().max() > 0.1


def test_random_batches():
    generator = random.Random(5)
    torch.manual_seed(5)
    for _ in range(4):
        lengths = [generator.choice([0, 1, 2, 15, 16, 17, 31]) for _ in range(4)]
        starts = [sum(lengths[:i]) for i in range(4)]
        key_lengths = [generator.randint(0, n) for n in lengths]
        prefixes = [
            tuple((starts[j], starts[j] + lengths[j]) for j in range(i) if generator.random() < 0.4)
            for i in range(4)
        ]
        q, k, v = heads_of(sum(lengths), 2, 1, generator.choice([16, 40]))
        compare(
            q,
            k,
            v,
            lengths,
            key_lengths,
            prefixes,
            causal=generator.random() < 0.5,
            window=generator.choice([None, 1, 8, 20]),
            softcap=generator.choice([None, 3.0]),
        )


def test_the_registered_function_uses_the_kernel_on_a_gpu(monkeypatch):
    """Where there is none, a tensor that says that it is on one."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    planned = []
    make = attention_plan.make_plan
    monkeypatch.setattr(attention_plan, "make_plan", lambda *a, **k: planned.append(a) or make(*a, **k))
    torch.manual_seed(0)
    q, k, v = heads_of(sum(LENGTHS), 2, 1, 32)
    lengths = list(LENGTHS)
    for window in (None, 4):
        got, _ = packed_attention(
            torch.nn.Module(),
            *(x.transpose(0, 1)[None] for x in (q, k, v)),
            None,
            sliding_window=window,
            sequence_lengths=lengths,
        )
        expected = varlen_attention_reference(q, k, v, LENGTHS, window=window)
        torch.testing.assert_close(got[0], expected, atol=1e-5, rtol=0)
    assert planned == [(lengths, None, None)], "once for all layers"


def test_refusals():
    q = torch.randn(4, 4, 32, device=DEVICE)
    plan = make_plan([4], device=DEVICE)
    for k, reason in [
        (q[:, :3], "Hq a multiple of Hkv"),
        (q[:3], "do not fit a plan"),
        (q.double(), "one floating-point format"),
        (q.transpose(1, 2).contiguous().transpose(1, 2), "side by side"),
    ]:
        with pytest.raises(ValueError, match=reason):
            varlen_attention(q, k, k, plan)
    wide = torch.randn(4, 1, 257, device=DEVICE)
    with pytest.raises(ValueError, match="256 is the limit"):
        varlen_attention(wide, wide, wide, plan)
    with pytest.raises(ValueError, match="must be above 0"):
        varlen_attention(q, q, q, plan, window=0)
