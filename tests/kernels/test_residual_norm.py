import random

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from kernels.residual_norm import (
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    layer_norm_reference,
    rms_norm,
    rms_norm_reference,
)
from tests.kernels.conftest import DEVICE, HALF

# Half precision: the answer is rounded as the reference's is, but a float32 sum in another order may fall to
# the other side: one unit of the last of 8 (or 11) bits.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}


def tensors(rows, size, dtype=torch.float32):
    """x, residual, weight, bias: weights near 1 would hide a (1 + weight)."""
    x, residual = (torch.randn(rows, size, device=DEVICE).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(size, device=DEVICE).to(dtype) for _ in range(2))
    return 3 * x + 2, residual, weight, bias


def close(got, expected):
    tolerance = TOLERANCES[got.dtype]
    torch.testing.assert_close(got, expected.to(got.dtype), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (5, 33), (2, 768), (3, 1025)])
def test_layer_norm(rows, size, dtype):
    torch.manual_seed(0)
    x, residual, weight, bias = tensors(rows, size, dtype)
    close(layer_norm(x, weight, bias, 1e-5), layer_norm_reference(x, None, weight, bias, 1e-5)[0])
    close(layer_norm(x, weight, None, 1e-5), layer_norm_reference(x, None, weight, None, 1e-5)[0])
    expected, total = layer_norm_reference(x, residual, weight, bias, 1e-5)
    close(layer_norm(x, weight, bias, 1e-5, residual), expected)
    normed, got = add_layer_norm(x, residual, weight, bias, 1e-5)
    close(normed, expected)
    assert torch.equal(got, total)
    if size > 1:
        other = layer_norm_reference(x, None, weight, bias, 1e-5)[0]
        assert (normed - other).abs().max() > 0.1, "a lost residual must show"


@pytest.mark.parametrize("adds_one", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("rows", "size"), [(9, 128), (2, 1000)])
def test_rms_norm(rows, size, dtype, adds_one):
    torch.manual_seed(0)
    x, residual, weight, _ = tensors(rows, size, dtype)
    close(
        rms_norm(x, weight, 1e-6, adds_one=adds_one),
        rms_norm_reference(x, None, weight, 1e-6, adds_one=adds_one)[0],
    )
    expected, total = rms_norm_reference(x, residual, weight, 1e-6, adds_one=adds_one)
    normed, got = add_rms_norm(x, residual, weight, 1e-6, adds_one=adds_one)
    close(normed, expected)
    close(rms_norm(x, weight, 1e-6, residual, adds_one=adds_one), expected)
    assert torch.equal(got, total)
    other, _ = rms_norm_reference(x, residual, weight, 1e-6, adds_one=not adds_one)
    assert (normed - other).abs().max() > 0.1


@pytest.mark.parametrize(("layer", "adds_one"), [(Qwen3RMSNorm, False), (GemmaRMSNorm, True)])
def test_rounds_where_transformers_rounds(layer, adds_one):
    torch.manual_seed(0)
    x, _, weight, _ = tensors(64, 96, HALF)
    module = layer(96, eps=1e-6).to(DEVICE, HALF)
    module.weight.data.copy_(weight)
    expected = module(x).detach()
    assert torch.equal(rms_norm_reference(x, None, weight, 1e-6, adds_one=adds_one)[0], expected)
    got = rms_norm(x, weight, 1e-6, adds_one=adds_one)
    assert (got != expected).float().mean() < 1e-3, "sums in another order, at a tie now and then"
    late = (torch.nn.functional.rms_norm(x.float(), (96,), None, 1e-6) * (weight.float() + adds_one)).to(HALF)
    assert adds_one or (late != expected).float().mean() > 0.05, "the other order of casts must show"


def test_rows_of_a_larger_tensor():
    torch.manual_seed(0)
    x, residual, weight, bias = tensors(4, 40)
    wide = torch.cat([x, residual], 1)
    expected, _ = layer_norm_reference(x, residual, weight, bias, 1e-5)
    close(layer_norm(wide[:, :40], weight, bias, 1e-5, wide[:, 40:]), expected)


def test_random_shapes():
    generator = random.Random(3)
    torch.manual_seed(3)
    for _ in range(6):
        x, residual, weight, bias = tensors(generator.randint(0, 70), generator.randint(2, 300))
        given = residual if generator.random() < 0.5 else None
        close(
            layer_norm(x, weight, bias, 1e-12, given),
            layer_norm_reference(x, given, weight, bias, 1e-12)[0],
        )


def test_refusals():
    x, residual, weight, bias = tensors(3, 8)
    for given, reason in [
        ((x[None], weight, bias, 1e-5), "takes rows"),
        ((x.t().contiguous().t(), weight, bias, 1e-5), "side by side"),
        ((x, weight[:7], bias, 1e-5), "weight is \\[7\\] for rows of 8"),
        ((x, weight, bias, 1e-5, residual[:2]), "beside x"),
        ((x, weight.to(HALF), bias, 1e-5), "not of one format"),
    ]:
        with pytest.raises(ValueError, match=reason):
            layer_norm(*given)
