import random

import pytest
import torch
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from kernels.rotary import rotate_, rotate_reference
from tests.kernels.conftest import DEVICE, HALF

# Half precision: rounded once, of sums that may fall to the other side of a tie.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}


def angles(total, size, dtype=torch.float32):
    """cos and sin [total, size], both halves alike."""
    found = torch.randn(total, size // 2, device=DEVICE).repeat(1, 2) * 3
    return found.cos().to(dtype), found.sin().to(dtype)


def heads_of(total, heads, kv_heads, size, dtype=torch.float32):
    fused = torch.randn(total, heads + 2 * kv_heads, size, device=DEVICE).to(dtype)
    return fused, *fused.split([heads, kv_heads, kv_heads], dim=1)


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=TOLERANCES[got.dtype], rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("size", [32, 64, 72, 80, 96, 128, 256])
def test_turns_views_of_a_fused_projection_in_place(size, dtype):
    torch.manual_seed(0)
    fused, q, k, v = heads_of(3, 3, 1, size, dtype)
    before = fused.clone()
    cos, sin = angles(3, size, dtype)
    expected = rotate_reference(q, k, cos, sin)
    got = rotate_(q, k, cos, sin)
    assert got[0] is q
    close(q, expected[0])
    close(k, expected[1])
    assert torch.equal(v, before[:, 4:]), "the values are in the same memory, and stay"
    assert (q - rotate_reference(before[:, :3], k, cos, -sin)[0]).abs().max() > 0.1


def test_a_part_of_the_dimensions():
    torch.manual_seed(0)
    _, q, k, _ = heads_of(4, 2, 2, 40)
    cos, sin = angles(4, 24)
    before = q.clone()
    expected = rotate_reference(q, k, cos, sin)
    rotate_(q, k, cos, sin)
    close(q, expected[0])
    close(k, expected[1])
    assert torch.equal(q[..., 24:], before[..., 24:])


def test_halves_with_angles_of_their_own():
    torch.manual_seed(0)
    _, q, k, _ = heads_of(4, 2, 2, 16)
    cos, sin = torch.randn(4, 16, device=DEVICE), torch.randn(4, 16, device=DEVICE)
    expected = rotate_reference(q, k, cos, sin)
    close(rotate_(q, k, cos, sin)[0], expected[0])


def test_equals_transformers():
    torch.manual_seed(0)
    _, q, k, _ = heads_of(5, 4, 2, 64, HALF)
    cos, sin = angles(5, 64)
    # transformers: [1, H, t, D]
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    rotated = rotate_reference(q, k, cos, sin)
    assert all(torch.equal(a, b[0].transpose(0, 1)) for a, b in zip(rotated, expected, strict=True))
    rows = (q.transpose(0, 1).contiguous().transpose(0, 1), k)
    for got, wanted in zip(rotate_(*rows, cos, sin), expected, strict=True):
        close(got, wanted[0].transpose(0, 1))


def test_random_shapes():
    generator = random.Random(2)
    torch.manual_seed(2)
    for _ in range(6):
        size = 2 * generator.randint(1, 40)
        _, q, k, _ = heads_of(generator.randint(0, 4), generator.randint(1, 5), generator.randint(1, 3), size)
        cos, sin = angles(len(q), 2 * generator.randint(1, size // 2))
        expected = rotate_reference(q, k, cos, sin)
        for got, wanted in zip(rotate_(q, k, cos, sin), expected, strict=True):
            close(got, wanted)


def test_refusals():
    _, q, k, _ = heads_of(3, 2, 2, 16)
    cos, sin = angles(3, 16)
    for given, reason in [
        ((q, k[:2], cos, sin), "they are"),
        ((q, k.double(), cos, sin), "they are"),
        ((q, k, cos[:2], sin[:2]), "for 3 tokens"),
        ((q, k, cos, sin[:, :8]), "for 3 tokens"),
        ((q, k, *angles(3, 18)), "heads of 16"),
        ((q.transpose(1, 2).contiguous().transpose(1, 2), k, cos, sin), "q must lie side by side"),
        ((q, k[:1].expand(3, -1, -1), cos, sin), "k is expanded"),
    ]:
        with pytest.raises(ValueError, match=reason):
            rotate_(*given)
