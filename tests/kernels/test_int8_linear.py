import pytest
import torch
import torch.nn.functional as F

from kernels.int8_linear import Int8Linear, can_quantize


def layers(sizes, *, bias=True):
    torch.manual_seed(0)
    return [torch.nn.Linear(48, size, bias=bias).requires_grad_(False) for size in sizes]


def tokens(count):
    """Some with one large component, as hidden states have, and one that is constant."""
    torch.manual_seed(1)
    x = torch.randn(1, count, 48)
    x[..., 5] *= 12
    x[0, 0] = 0.25
    return x


def exact(own, x, levels):
    """The same rounding in float64, with sums that cannot overflow."""
    weight = torch.cat([layer.weight for layer in own]).double()
    scales = weight.abs().amax(1, keepdim=True) / 127
    weight = (weight / scales).round() * scales
    least, most = torch.aminmax(x.double(), dim=-1, keepdim=True)
    step = ((most - least) / levels).clamp_min(1e-12)
    rounded = ((x.double() - least) / step).round() * step + least
    bias = None if own[0].bias is None else torch.cat([layer.bias for layer in own]).double()
    return F.linear(rounded, weight, bias)


@pytest.mark.parametrize("count", [1, 7, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_same_rounding_in_float64(count, bias):
    own = layers((16, 40), bias=bias)
    packed = Int8Linear(own)
    x = tokens(count)
    got, expected = packed(x).double(), exact(own, x, packed.levels)
    # A value in the middle of two integers may go either way in float32.
    assert (got - expected).norm() < 2e-3 * expected.norm()
    if count > 1:
        coarser = exact(own, x, packed.levels // 2)
        assert (got - coarser).norm() > 4e-3 * expected.norm(), "the comparison must see half the levels"


def test_a_token_is_the_same_beside_any_neighbour():
    packed = Int8Linear(layers((16,)))
    x = tokens(20)
    alone = torch.cat([packed(x[:, i : i + 1]) for i in range(20)], dim=1)
    torch.testing.assert_close(packed(x), alone, rtol=0, atol=1e-6)


def test_adds_a_residual_or_applies_gelu():
    packed = Int8Linear(layers((16,)))
    x, residual = tokens(9), torch.randn(1, 9, 16)
    torch.testing.assert_close(packed(x, residual), packed(x) + residual)
    torch.testing.assert_close(packed(x, activation="gelu"), F.gelu(packed(x)))


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="some of the layers have a bias"):
        Int8Linear([*layers((8,)), *layers((8,), bias=False)])
    assert can_quantize(torch.zeros(4, 4))
    assert not can_quantize(torch.zeros(4, 4, dtype=torch.bfloat16))
