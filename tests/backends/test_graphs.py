"""Passes of a fixed size. Without a GPU they are replayed by running the captured function again, on the same
tensors, with the attention's kernel in triton's interpreter.
"""

import logging

import numpy as np
import pytest
import torch

from backends.checkpoint import Checkpoint
from backends.errors import OptionError
from backends.families import family_of
from backends.forward import Segments
from backends.graphs import GraphedForward, choose_size
from backends.options import ServingOptions
from backends.ragged import Ragged
from backends.self_check import choose_forward
from tests.kernels.conftest import DEVICE, _interpreted  # noqa: F401 (it chooses the interpreter, for all)
from tests.support import checkpoints

pytest.importorskip("triton")


@pytest.fixture
def forward(tmp_path, request):
    make = getattr(checkpoints, getattr(request, "param", "bert"))
    checkpoint = Checkpoint.read(make(tmp_path / "m"))
    family = family_of(checkpoint)
    made = choose_forward(
        lambda attention: family.load(checkpoint, attention, torch.float32, DEVICE),
        family,
        dict(checkpoint.config),
        "test",
    )
    made.fills_rows = False  # as on a GPU
    return made


class Capture:
    """Runs again what it captured, and counts."""

    def __init__(self, fault=None):
        self.captured = self.replayed = 0
        self.fault = fault

    def __call__(self, run):
        self.captured += 1
        if self.fault is not None:
            raise self.fault

        def replay():
            self.replayed += 1
            return run()

        return replay


def batch(*lengths, seed=1):
    ids = (torch.arange(1, sum(lengths) + 1) * 7919 * seed % 90 + 5).to(DEVICE)
    return Ragged(ids, np.array(lengths, np.int64))


@pytest.mark.parametrize(
    ("lengths", "size"),
    [
        ([1], (64, 16)),
        ([64], (64, 64)),
        ([60, 5], (128, 16)),
        ([50, 60], (128, 64)),
        ([100], (128, 128)),
        ([8] * 16, (128, 16)),
        ([4] * 17 + [60], None),
        ([512] * 4, (2048, 128)),
        ([1] * 9, None),
        ([1024, 1025], None),
        ([], None),
    ],
)
def test_the_size_of_a_pass(lengths, size):
    assert choose_size(np.array(lengths, np.int64)) == size


@pytest.mark.parametrize("forward", ["bert", "qwen3", "modernbert"], indirect=True)
def test_a_pass_of_fixed_size_gives_the_same_numbers(forward, monkeypatch):
    """Both for the lengths that it was captured with and for others of the same size."""
    batches = [batch(9, 4), batch(17, 0, 2, 5, seed=3)]
    with torch.inference_mode():
        expected = [forward(each) for each in batches]
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        capture = Capture()
        graphed = GraphedForward(forward, None if DEVICE.type == "cuda" else capture)
        got = [graphed(each) for each in (batches[0], batches[1], batches[0])]
    assert not graphed._is_off
    assert list(graphed._passes) == [(64, 16)]
    if DEVICE.type == "cpu":
        assert (capture.captured, capture.replayed) == (1, 3), "once to compare"
    for one, other in zip(got, (*expected, expected[0]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert (got[0] - got[1][: len(got[0])]).abs().max() > 0.1


def test_texts_of_a_pair_are_told_apart(forward, monkeypatch):
    pairs, firsts = batch(9, 8), np.array([4, 5])
    with torch.inference_mode():
        expected = forward(pairs, first_lengths=firsts)
        assert (expected - forward(pairs)).abs().max() > 0.1
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        graphed = GraphedForward(forward, None if DEVICE.type == "cuda" else Capture())
        graphed(pairs)
        torch.testing.assert_close(graphed(pairs, first_lengths=firsts), expected, atol=1e-5, rtol=1e-5)


def test_what_no_graph_is_for_runs_as_before(forward):
    capture = Capture()
    graphed = GraphedForward(forward, capture)
    few = batch(6, 6)
    with torch.inference_mode():
        for options in (
            {"key_lengths": np.array([5, 6])},
            {"segments": Segments(np.array([0, 6]), [(), ((0, 6),)])},
        ):
            assert torch.equal(graphed(few, **options), forward(few, **options))
        many = batch(*[1] * 9)
        assert torch.equal(graphed(many), forward(many))
    assert capture.captured == 0


def _is_on_no_gpu(forward):
    """Here the attention is computed by no kernel, and takes no plan."""
    return GraphedForward(forward, lambda run: run), "no kernel takes the attention of BertSelfAttention"


def _cannot_capture(forward):
    return GraphedForward(forward, Capture(RuntimeError("not permitted"))), "RuntimeError: not permitted"


def _gives_other_numbers(forward):
    expected = forward(batch(9, 4))
    wrong = torch.cat([expected.flip(0), torch.zeros(64 - 13, expected.shape[1], device=DEVICE)])
    return GraphedForward(forward, lambda run: lambda: wrong), "relative error 0."


def _gives_no_numbers(forward):
    return GraphedForward(
        forward, lambda run: lambda: torch.full((64, 32), float("nan"))
    ), "relative error nan"


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(_is_on_no_gpu, marks=pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")),
        _cannot_capture,
        _gives_other_numbers,
        _gives_no_numbers,
    ],
)
def test_a_graph_that_fails_is_the_last_and_the_process_lives(make, forward, caplog):
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        expected = forward(batch(9, 4))
        graphed, reason = make(forward)
        answers = [graphed(batch(9, 4)) for _ in range(3)]
    for answer in answers:
        torch.testing.assert_close(answer, expected)
    (warning,) = [record.message for record in caplog.records if "CUDA graphs" in record.message]
    assert reason in warning
    assert graphed._passes == {}


def test_an_answer_is_nobody_elses(forward, monkeypatch):
    out = torch.zeros(64, 32, device=DEVICE)
    monkeypatch.setattr("backends.graphs.relative_error", lambda *given: 0.0)
    graphed = GraphedForward(forward, lambda run: lambda: out)
    with torch.inference_mode():
        graphed(batch(3))
        answer = graphed(batch(3))
        out += 1
    assert answer.tolist() == [[0.0] * 32] * 3


def test_on_a_cpu_there_are_none():
    with pytest.raises(OptionError, match="cuda_graphs is for a GPU"):
        ServingOptions(cuda_graphs=True, device="cpu")
