"""That heads use a GPU's kernels where there are some, in triton's interpreter, and say the same."""

import numpy as np
import pytest
import torch

from backends import device
from backends.contract import INPUT_IDS
from backends.heads import sparse
from backends.ragged import Ragged
from backends.sentence_modules import Pooling
from tests.kernels.conftest import DEVICE, _interpreted  # noqa: F401 (it chooses the interpreter, for all)

pytest.importorskip("triton")
from kernels import segment_pooling, sparse_max

LENGTHS = np.array([3, 1, 6])


@pytest.fixture
def with_kernels(monkeypatch):
    """Counts the calls of a kernel's launcher from now on, by its name."""
    calls = []

    def spy(module, name):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: calls.append(name) or plain(*a, **k))

    def start():
        monkeypatch.setattr(device, "_KERNEL_DEVICES", {DEVICE.type})
        spy(segment_pooling, "pool")
        spy(sparse_max, "splade")
        spy(sparse_max, "lexical_weights")
        return calls

    monkeypatch.setattr(device, "_KERNEL_DEVICES", set())
    return start


def hidden_states():
    torch.manual_seed(0)
    return Ragged(torch.randn(10, 8, device=DEVICE), LENGTHS)


@pytest.mark.parametrize("prompts", [None, [1, 0, 4], [9, 9, 9]])
def test_pooling(prompts, with_kernels):
    modes = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
    pooling = Pooling(modes)
    skipped = None if prompts is None else torch.tensor(prompts)
    expected = pooling(hidden_states(), skipped)
    calls = with_kernels()
    torch.testing.assert_close(pooling(hidden_states(), skipped), expected, atol=1e-6, rtol=1e-5)
    assert calls == ["pool"] * len(modes)


@pytest.mark.parametrize("chunk", [100, 4, 2])
@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_splade(chunk, pooling, with_kernels, monkeypatch):
    """Texts share a kernel as far as they are small; a larger one is pooled in parts."""
    monkeypatch.setattr(sparse, "_KERNEL_CHUNK", chunk)
    torch.manual_seed(1)
    logits = torch.nn.Linear(8, 40).to(DEVICE).requires_grad_(False)
    head = sparse.Splade(logits, pooling, "log1p_relu")
    expected = head(hidden_states(), {})
    calls = with_kernels()
    got = head(hidden_states(), {})
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert len(got[0]) > 20
    assert calls == ["splade"] * {100: 1, 4: 1, 2: 1}[chunk]


def test_weights_of_the_tokens_of_a_text(with_kernels):
    torch.manual_seed(2)
    linear = torch.nn.Linear(8, 1).to(DEVICE).requires_grad_(False)
    head = sparse.TokenWeights(linear, torch.tensor([7], device=DEVICE), 50)
    ids = {INPUT_IDS: torch.tensor([9, 3, 9, 3, 4, 49, 4, 0, 7, 4], dtype=torch.int32)}
    expected = head(hidden_states(), ids)
    calls = with_kernels()
    got = head(hidden_states(), ids)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert len(got[0]) > 3
    assert calls == ["lexical_weights"]
