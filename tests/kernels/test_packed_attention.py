import pytest
import torch

from kernels.packed_attention import _runs, packed_attention

LENGTHS = [7, 7, 3, 1, 5, 5]


def dense_reference(q, k, v, lengths, causal, window, softcap, scaling):
    """One big masked softmax in float64, with nothing of the function under test in it."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(len(owner))
    distance = position[:, None] - position[None]
    allowed = owner[:, None] == owner[None]
    if causal:
        allowed &= distance >= 0
    if window is not None:
        allowed &= distance.abs() < window
    scores = (q.double() @ k.double().transpose(-1, -2)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return (weights @ v.double())[0].transpose(0, 1)[None]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 32), (6, 2, 72), (2, 1, 80)])
def test_equals_masked_attention_in_float64(causal, window, softcap, heads, kv_heads, size):
    torch.manual_seed(0)
    total = sum(LENGTHS)
    q = torch.randn(1, total, heads, size).transpose(1, 2)
    k, v = (torch.randn(1, total, kv_heads, size).transpose(1, 2) for _ in range(2))
    got, _ = packed_attention(
        torch.nn.Module(),
        q,
        k,
        v,
        None,
        is_causal=causal,
        sliding_window=window,
        softcap=softcap,
        sequence_lengths=LENGTHS,
    )
    expected = dense_reference(q, k, v, LENGTHS, causal, window, softcap, size**-0.5)
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=1e-5)
    wrong = dense_reference(q, k, v, [total], causal, window, softcap, size**-0.5)
    if window is None:
        assert (got.double() - wrong).abs().max() > 0.1, "the reference must see a lost boundary"


def test_takes_strided_values_of_a_fused_projection():
    torch.manual_seed(0)
    fused = torch.randn(1, sum(LENGTHS), 3, 4, 16)
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    got, _ = packed_attention(torch.nn.Module(), q, k, v, None, sequence_lengths=LENGTHS)
    expected = dense_reference(q, k, v, LENGTHS, False, None, None, 0.25)
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=1e-5)


def test_tokens_behind_the_last_sequence_belong_to_none():
    torch.manual_seed(0)
    total = sum(LENGTHS)
    q, k, v = (torch.randn(1, 2, total + 4, 16) for _ in range(3))
    v[:, :, total:] = float("nan")
    got, _ = packed_attention(torch.nn.Module(), q, k, v, None, sequence_lengths=LENGTHS)
    expected = dense_reference(*(x[:, :, :total] for x in (q, k, v)), LENGTHS, False, None, None, 0.25)
    torch.testing.assert_close(got[:, :total].double(), expected, atol=2e-6, rtol=1e-5)
    assert not got[:, total:].any()


@pytest.mark.parametrize("lengths", [[9], [4, 4], [0, 9], []])
@pytest.mark.parametrize("n_behind", [0, 3])
def test_one_sequence_alone_and_values_of_another_width(lengths, n_behind):
    torch.manual_seed(0)
    total = sum(lengths)
    q, k = (torch.randn(1, 2, total + n_behind, 16) for _ in range(2))
    v = torch.randn(1, 2, total + n_behind, 24)
    got, _ = packed_attention(torch.nn.Module(), q, k, v, None, sequence_lengths=lengths)
    assert got.shape == (1, total + n_behind, 2, 24)
    if total:
        expected = dense_reference(*(x[:, :, :total] for x in (q, k, v)), lengths, False, None, None, 0.25)
        torch.testing.assert_close(got[:, :total].double(), expected, atol=2e-6, rtol=1e-5)
        wrong = dense_reference(*(x[:, :, :total] for x in (q, k, v)), [total], True, None, None, 0.25)
        assert (got[:, :total] - wrong).abs().max() > 0.1, "negative control"
    assert not got[:, total:].any()


def test_takes_causality_from_the_module():
    q = torch.randn(1, 2, 4, 8)
    module = torch.nn.Module()
    module.is_causal = True
    got, _ = packed_attention(module, q, q, q, None, sequence_lengths=[4])
    torch.testing.assert_close(got[0, 0], q[0, :, 0])


def test_refuses_what_is_not_packed():
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match="without a packed batch"):
        packed_attention(torch.nn.Module(), q, q, q, None)
    with pytest.raises(RuntimeError, match="without a packed batch"):
        packed_attention(torch.nn.Module(), q, q, q, torch.ones(1), sequence_lengths=[4])
    with pytest.raises(NotImplementedError, match="position_bias"):
        packed_attention(torch.nn.Module(), q, q, q, None, sequence_lengths=[4], position_bias=torch.ones(1))


def test_runs_of_equal_lengths():
    assert list(_runs([3, 3, 0, 2, 3])) == [(2, 3, 3, ()), (1, 2, 2, ()), (1, 3, 3, ())]
    assert list(_runs([])) == []
    behind = ((0, 9),)
    assert list(_runs([9, 3, 3], None, [(), behind, behind])) == [(1, 9, 9, ()), (2, 3, 3, behind)]
    many = list(_runs([40000, *[1] * 5], None, [(), *[((0, 40000),)] * 5]))
    assert many[1:] == [(1, 1, 1, ((0, 40000),))] * 5, "keys are put together in parts"
