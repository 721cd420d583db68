import random

import pytest
import torch
from transformers.activations import ACT2FN

from kernels.gated_activation import (
    ACTIVATIONS,
    activate_reference,
    bias_activation,
    bias_activation_reference,
    gated_activation,
    gated_activation_reference,
)
from tests.kernels.conftest import DEVICE, HALF

# float32: the exponential is another one. Half precision: one unit of the last of 8 (or 11) bits, twice.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def numbers(*shape, dtype=torch.float32):
    """Also where activations are flat."""
    return (4 * torch.randn(*shape, device=DEVICE)).to(dtype)


def close(got, expected):
    tolerance = TOLERANCES[got.dtype]
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_gates_in_one_tensor_and_in_two(activation, dtype):
    torch.manual_seed(0)
    fused = numbers(3, 2 * 77, dtype=dtype)
    first, second = fused.chunk(2, 1)
    expected = activate_reference(first, activation) * second
    close(gated_activation(fused, activation=activation), expected)
    close(gated_activation(first, second, activation=activation), expected)
    turned = gated_activation(fused, activation=activation, is_gate_first=False)
    close(turned, gated_activation_reference(fused, activation=activation, is_gate_first=False))
    assert (turned - expected).abs().max() > 0.1, "the other order must show"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_bias_and_activation(activation, dtype):
    torch.manual_seed(0)
    x, bias = numbers(3, 1500, dtype=dtype), numbers(1500, dtype=dtype)
    # x + bias is not rounded between: the product of matrices would have added it before it rounded.
    expected = activate_reference(x.float() + bias.float(), activation).to(dtype)
    close(bias_activation(x, bias, activation=activation), expected)
    close(bias_activation(x, activation=activation), bias_activation_reference(x, activation=activation))
    assert (bias_activation_reference(x, activation=activation) - expected).abs().max() > 0.1


def test_names_are_what_transformers_means():
    x = torch.linspace(-8, 8, 1001)
    theirs = {"gelu_tanh": "gelu_pytorch_tanh"}
    for name in ACTIVATIONS:
        torch.testing.assert_close(activate_reference(x, name), ACT2FN[theirs.get(name, name)](x))
        got = bias_activation(x[None].to(DEVICE), activation=name)[0].cpu()
        torch.testing.assert_close(got, activate_reference(x, name), atol=2e-6, rtol=2e-6)
    difference = activate_reference(x, "gelu") - activate_reference(x, "gelu_tanh")
    assert difference.abs().max() > 1e-4, "the two kinds of gelu must differ"


def test_infinite_values():
    x = torch.tensor([[float("inf"), float("-inf"), 100.0, -100.0, float("nan")]], device=DEVICE)
    for name in ("silu", "gelu", "gelu_tanh"):
        got = bias_activation(x, activation=name)[0]
        assert got[0] == torch.inf
        assert got[2] == 100
        assert got[3].abs() < 1e-6
    close_relu = bias_activation(x, activation="relu")
    torch.testing.assert_close(close_relu, torch.relu(x), equal_nan=True)


def test_random_shapes():
    generator = random.Random(1)
    torch.manual_seed(1)
    for _ in range(8):
        size = generator.choice([1, 7, 64, 1023, 1024, 1025])
        fused = numbers(generator.randint(0, 4), 2 * size)
        given = {"activation": generator.choice(ACTIVATIONS), "is_gate_first": generator.random() < 0.5}
        close(gated_activation(fused, **given), gated_activation_reference(fused, **given))


def test_refusals():
    x = numbers(2, 7)
    for call, reason in [
        (lambda: gated_activation(x, activation="silu"), r"they are \[t, 2 f\]"),
        (lambda: gated_activation(x, x[:1], activation="silu"), "beside gate"),
        (lambda: gated_activation(x, x.half(), activation="silu"), "beside gate"),
        (lambda: gated_activation(x, x, activation="swish"), "unknown activation 'swish'"),
        (lambda: bias_activation(x, x[0, :3], activation="silu"), "bias is"),
        (lambda: bias_activation(x.t(), activation="silu"), "side by side"),
        (lambda: bias_activation(x.int(), activation="silu"), "int32"),
    ]:
        with pytest.raises(ValueError, match=reason):
            call()
