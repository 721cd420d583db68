"""That every kind of kernel is compiled at load, seen by the plans that are made."""

import logging

import numpy as np
import pytest
import torch

from backends import device
from backends.checkpoint import Checkpoint
from backends.stages.head import HeadStage
from backends.stages.loaded_head import LoadedHead
from backends.warm_up import passes, warm_up
from kernels.attention_plan import choose_block
from tests.backends.test_stages import start
from tests.kernels.conftest import DEVICE, _interpreted  # noqa: F401 (it chooses the interpreter, for all)
from tests.support import checkpoints
from tests.support.pipeline import load_forward

MOST = (16, 32, 64, 128)


@pytest.mark.parametrize("shares_prefixes", [False, True])
@pytest.mark.parametrize("largest", MOST[1:])
def test_every_block_of_queries_is_planned(largest, shares_prefixes):
    kinds = {
        (choose_block(lengths, largest), segments is not None, int(lengths.sum()) % 16 == 0)
        for lengths, segments in passes(8192, shares_prefixes=shares_prefixes)
    }
    expected = {(block, False, even) for block in MOST if block <= largest for even in (True, False)}
    assert kinds >= expected
    behind = {block for block, is_behind, _ in kinds if is_behind}
    assert behind == ({block for block in MOST if block <= largest} if shares_prefixes else set())


@pytest.mark.parametrize("limit", [2, 20, 77])
def test_no_sequence_is_longer_than_the_positions(limit):
    longest = 0
    for lengths, segments in passes(limit, shares_prefixes=True):
        starts = np.zeros_like(lengths) if segments is None else segments.starts
        longest = max(longest, int((lengths + starts).max()))
    assert longest == limit


def test_a_model_of_few_positions_that_shares_prefixes_runs_all_passes(tmp_path, caplog):
    forward = load_forward(Checkpoint.read(checkpoints.qwen3(tmp_path / "m")), shares_prefixes=True)
    assert forward.shares_prefixes
    with caplog.at_level(logging.INFO):
        warm_up(forward, 40)
    assert "compiled its kernels" in caplog.text


@pytest.mark.parametrize("head", ["dense", "sparse", "colbert"])
def test_a_head_runs_at_load(head, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "_KERNEL_DEVICES", {DEVICE.type})
    calls = []
    plain = LoadedHead._warm_up
    monkeypatch.setattr(LoadedHead, "_warm_up", lambda self, *a: calls.append(a) or plain(self, *a))
    start(HeadStage(), checkpoints.bge_m3(tmp_path / "c"), head=head, device="cpu")
    ((hidden,),) = calls
    assert (hidden.shape, hidden.dtype) == ((2, 32), torch.float32)
