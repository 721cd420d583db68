import pytest
import torch
import torch.nn.functional as F

from kernels.half_linear import HalfLinear, can_halve


def layers(sizes, *, bias=True):
    torch.manual_seed(0)
    return [torch.nn.Linear(48, size, bias=bias).requires_grad_(False) for size in sizes]


@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 7, 48), (2, 3, 48), (300, 48), (1, 0, 48)])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_rounded_weights_in_float64(shape, bias):
    own = layers((16, 40), bias=bias)
    x = torch.randn(shape) * 3
    got = HalfLinear(own)(x)
    weight = torch.cat([layer.weight for layer in own])
    total = torch.cat([layer.bias for layer in own]).double() if bias else None
    expected = F.linear(x.double(), weight.half().double(), total)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=1e-5)
    if x.numel():
        exact = F.linear(x.double(), weight.double(), total)
        assert (got - exact).abs().max() > 5e-5, "the comparison must see the rounding"


def test_takes_what_is_not_contiguous():
    packed = HalfLinear(layers((16,)))
    x = torch.randn(9, 96)
    for view in (x[:, :48], x[:, ::2], torch.randn(48, 9).t()):
        torch.testing.assert_close(packed(view), packed(view.contiguous()), rtol=0, atol=0)


def test_adds_a_residual_or_applies_gelu():
    packed = HalfLinear(layers((16,)))
    x, residual = torch.randn(1, 9, 48), torch.randn(1, 9, 16)
    before = residual.clone()
    torch.testing.assert_close(packed(x, residual), packed(x) + residual)
    torch.testing.assert_close(packed(x, activation="gelu"), F.gelu(packed(x)))
    assert torch.equal(residual, before)


def test_keeps_no_tensor_beside_what_is_packed():
    packed = HalfLinear(layers((16, 40)))
    assert not list(packed.parameters()) + list(packed.buffers())
    assert not [name for name, value in vars(packed).items() if isinstance(value, torch.Tensor)]


def test_refuses_what_it_cannot_hold():
    for value in (7e4, float("nan"), float("inf")):
        (own,) = layers((16,))
        own.weight[3, 5] = value
        with pytest.raises(ValueError, match="a weight is beyond 65504, or not a number"):
            HalfLinear([own])
    with pytest.raises(ValueError, match="some have none"):
        HalfLinear([*layers((16,)), *layers((16,), bias=False)])
    assert can_halve(torch.zeros(1))
    assert not can_halve(torch.zeros(1, dtype=torch.bfloat16))
