"""A linear layer whose weight lies in the order that the CPU's matrix library multiplies it in.

x W^T + b, then an activation or a residual in the same pass where the library has it. Without packing, oneDNN
and MKL order the weight anew in each call, which for few tokens takes longer than the product: 9 tokens
through 384 x 1536 in float32 take 0.41 ms plain and 0.20 ms packed (2 cores, AVX2).

*Source:* torch 2.13, ATen/native/mkldnn/Linear.cpp (the operators that torch.compile uses).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.blockwise_gelu import blockwise_gelu

# From so many tokens on, MKL's own float32 product is up to a tenth faster on AVX2, and compiles nothing for
# each number of them.
_MANY_TOKENS = 257
# The library plans a product for about so many tokens; it takes any number.
_USUAL_TOKENS = 256


def can_pack(weight: torch.Tensor) -> bool:
    """Whether the matrix library of this processor takes the weight in an order of its own."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def has_fast_gelu() -> bool:
    """Whether the library's own error function is worth using: with AVX2 it takes longer than a second pass
    (4096 tokens through 384 x 1536: 48 ms fused, 39 ms apart).
    """
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


class PackedLinear(torch.nn.Module):
    """Linear layers over one input as one; their outputs lie side by side."""

    def __init__(self, layers: list[torch.nn.Linear], *, keeps_plain: bool) -> None:
        """`keeps_plain`: the plain weight stays in memory beside the packed one, for many tokens at once."""
        super().__init__()
        first = layers[0]
        weight = first.weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if len(biases) not in (0, len(layers)):
            raise ValueError("some of the layers have a bias, and some have none")
        self.bias = torch.cat([bias.data for bias in biases]) if biases else None
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _USUAL_TOKENS)
        self.plain = weight.detach() if keeps_plain and weight.dtype == torch.float32 else None
        self.compiles_long_rows = self.plain is None
        """Whether oneDNN multiplies many tokens, and compiles each number of them."""
        self.in_features, self.out_features = first.in_features, weight.shape[0]

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, activation: str = "none"
    ) -> torch.Tensor:
        """x [..., in], residual [..., out] -> [..., out]; activation is none or gelu, and not of a sum."""
        if self.plain is not None and x.numel() >= _MANY_TOKENS * self.in_features:
            y = F.linear(x, self.plain, self.bias)
            if residual is not None:
                return y.add_(residual)
            return blockwise_gelu(y) if activation == "gelu" else y
        if residual is not None:
            y = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")
        else:
            y = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, activation, [], "none")
        return y  # type: ignore[no-any-return]
