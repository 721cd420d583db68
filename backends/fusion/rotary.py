"""Lets the attention of one loaded model turn queries and keys by a kernel.

transformers' attention classes call a function of their module, apply_rotary_pos_emb. Here the forward of one
instance is given another function under that name: the class, its module and other models stay as they are.

*Source:* transformers 5.23, models/llama/modeling_llama.py; its copies in the other families are alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType

import torch

from kernels.rotary import rotate_, rotate_reference

_NAME = "apply_rotary_pos_emb"
_PARAMETERS = ["q", "k", "cos", "sin", "unsqueeze_dim"]

Turn = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def turn_with_kernel(module: torch.nn.Module) -> bool:
    """Whether a module's forward turns by that function, and from now on by a kernel."""
    own = _with_kernel(type(module).forward)
    if own is None:
        return False
    module.forward = MethodType(own, module)
    return True


@cache
def _with_kernel(forward: Callable[..., torch.Tensor]) -> FunctionType | None:
    """The same code with another function under the name; None for one that does not call it, or calls
    something else by that name.
    """
    # What a decorator has wrapped has only the wrapper's names: it stays as it is.
    if not isinstance(forward, FunctionType) or _NAME not in forward.__code__.co_names:
        return None
    plain = forward.__globals__.get(_NAME)
    if plain is None or not _is_known(plain):
        return None
    names = {**forward.__globals__, _NAME: _kernel_or(plain)}
    own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return own


def _is_known(plain: Turn) -> bool:
    """Whether it computes what the kernel does: halves are turned, not neighbours, by angles of their own."""
    if list(inspect.signature(plain).parameters) != _PARAMETERS:
        return False
    numbers = torch.linspace(0, 9, 96).sin()
    q, k = numbers[:48].view(1, 3, 2, 8), numbers[48:64].view(1, 1, 2, 8)
    cos, sin = numbers[64:80].view(1, 2, 8), numbers[80:].view(1, 2, 8)
    try:
        found = plain(q, k, cos, sin)
    except RuntimeError:
        # It takes other shapes.
        return False
    expected = rotate_reference(q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], sin[0])
    return all(
        torch.allclose(one[0].transpose(0, 1), other, atol=1e-6)
        for one, other in zip(found, expected, strict=True)
    )


def _kernel_or(plain: Turn) -> Turn:
    """The kernel for a packed row, and for all else the function itself."""

    def turn(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q [1, Hq, t, D], k [1, Hkv, t, D], which are this attention's own; cos and sin [1, t, r]."""
        is_row = q.ndim == 4 and len(q) == len(k) == 1 and unsqueeze_dim == 1
        if not is_row or cos.ndim != 3 or len(cos) != 1 or q.stride(3) != 1 or k.stride(3) != 1:
            return plain(q, k, cos, sin, unsqueeze_dim)
        rotate_(q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0].contiguous(), sin[0].contiguous())
        return q, k

    return turn
