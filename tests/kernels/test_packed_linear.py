import pytest
import torch
import torch.nn.functional as F

from kernels.packed_linear import PackedLinear, can_pack


def layers(sizes, *, bias=True):
    torch.manual_seed(0)
    return [torch.nn.Linear(24, size, bias=bias).requires_grad_(False) for size in sizes]


@pytest.mark.parametrize("tokens", [1, 7, 600])  # few, and more than from where on the plain weight is used
@pytest.mark.parametrize("keeps_plain", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("then", ["nothing", "gelu", "residual"])
def test_equals_the_layers_side_by_side(tokens, keeps_plain, bias, then):
    own = layers((16, 40), bias=bias)
    packed = PackedLinear(own, keeps_plain=keeps_plain)
    x, residual = torch.randn(1, tokens, 24), torch.randn(1, tokens, 56)
    expected = torch.cat([layer(x) for layer in own], dim=-1)
    if then == "gelu":
        got, expected = packed(x, activation="gelu"), F.gelu(expected)
    elif then == "residual":
        before = residual.clone()
        got, expected = packed(x, residual), expected + residual
        torch.testing.assert_close(residual, before, rtol=0, atol=0)
    else:
        got = packed(x)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    assert (got - expected.roll(1, -1)).abs().max() > 0.1, "the comparison must see a wrong column"


def test_refuses_layers_of_which_some_have_a_bias():
    with pytest.raises(ValueError, match="some of the layers have a bias"):
        PackedLinear([*layers((8,)), *layers((8,), bias=False)], keeps_plain=False)


def test_leaves_formats_to_torch_that_the_processor_does_not_multiply():
    assert can_pack(torch.zeros(4, 4))
    assert not can_pack(torch.zeros(4, 4, dtype=torch.float16))
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert can_pack(torch.zeros(4, 4, dtype=torch.bfloat16)) == supported
