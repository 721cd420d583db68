"""What a GPU's kernels put in place of modules, in triton's interpreter: the numbers of every family stay."""

import logging
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from backends import device
from backends.checkpoint import Checkpoint
from backends.families import FAMILIES, family_of
from backends.forward import PackedForward, PaddedForward, register_attention
from backends.fusion import fuse, on_gpu, rotary
from backends.ragged import Ragged
from backends.self_check import choose_forward
from kernels import packed_attention
from tests.kernels.conftest import DEVICE, _interpreted  # noqa: F401 (it chooses the interpreter, for all)
from tests.support import checkpoints, families

pytest.importorskip("triton")

_PADDED = ("deberta", "mpnet")
_BERT = {"Part": 9, "Residual": 6, "Activated": 3, "LayerNorm": 1, "PostNormLayer": 3}
_LLAMA = {"Part": 9, "Gated": 3, "RMSNorm": 7, "rotary": 3}
_GTE = {"Part": 9, "Gated": 3, "LayerNorm": 7, "rotary": 3}
# Of the tiny models, which have three layers, what stands in by what it is for.
EXPECTED = {
    "albert": {"Part": 3, "LayerNorm": 3, "Activation": 1},
    "bert": _BERT,
    "clip": {"Part": 18, "LayerNorm": 15},
    "deberta": {"Residual": 6, "Activated": 3, "LayerNorm": 2},
    "distilbert": {"Part": 9, "LayerNorm": 7},
    "electra": _BERT,
    "eurobert": _LLAMA,
    "gemma": _LLAMA,
    "gemma3": {**_LLAMA, "RMSNorm": 19},
    "gte": _GTE,
    "jina_v3": {"Part": 9, "LayerNorm": 7, "rotary": 3},
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "modernbert": {"Gated": 3, "LayerNorm": 7, "rotary": 3},
    "mpnet": {"Part": 9, "Residual": 3, "Activated": 3, "LayerNorm": 4},
    "nomic_bert": _GTE,
    "qwen2": _LLAMA,
    "qwen2_5_vl": {**_LLAMA, "Gated": 6, "RMSNorm": 14},
    "qwen2_vl": {**_LLAMA, "LayerNorm": 7},
    "qwen3": {**_LLAMA, "RMSNorm": 13},
    "qwen3_vl": {**_LLAMA, "RMSNorm": 13, "LayerNorm": 9},
    "roberta": _BERT,
    "xlm_roberta": _BERT,
}
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")


@pytest.fixture(autouse=True)
def _kernels_run_here(monkeypatch):
    monkeypatch.setattr(device, "_KERNEL_DEVICES", {DEVICE.type})


def unfused(checkpoint, name):
    register_attention()
    family = family_of(checkpoint)
    attention = None if name in _PADDED else packed_attention.NAME
    model = family.load(checkpoint, attention, torch.float32, DEVICE)
    way = PaddedForward if name in _PADDED else PackedForward
    return way(model, family, dict(checkpoint.config))


def two_texts():
    return Ragged((torch.arange(1, 12) * 7919 % 90 + 5).to(DEVICE), np.array([4, 7]))


def image_of(model, checkpoint):
    """What the model makes of one small image, or nothing."""
    if not hasattr(model, "see"):
        return torch.zeros(0)
    config = checkpoint.config["vision_config"]
    side = config["image_size"] // config["patch_size"] if "image_size" in config else 4
    size = 3 * config["patch_size"] ** 2
    patches = (torch.arange(side * side * size) * 7919 % 251).to(torch.uint8).view(-1, size)
    return model.see(patches, np.array([[1, side, side]]))


class Waits(TorchDispatchMode):
    """Notes operations whose result the host must know: on a GPU it would wait for all before them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.name()
        picks = function is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype is torch.bool for index in arguments[1]
        )
        if picks or name.split("::")[1].split(".")[0] in _WAITING:
            self.found.append(name)
        return function(*arguments, **(options or {}))


def stand_ins(model):
    found = Counter(
        type(module).__name__
        for module in model.modules()
        if type(module).__module__.startswith("backends.fusion")
    )
    del found["JointLinear"]
    found["rotary"] = sum("forward" in module.__dict__ for module in model.modules())
    return dict(+found)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_no_pass_over_texts_waits_for_the_device(name, tmp_path):
    forward = unfused(Checkpoint.read(families.FAMILIES[name](tmp_path / name)), name)
    with torch.inference_mode(), Waits() as waits:
        forward(two_texts())
    # transformers asks whether MPNet's padding mask hides anything, once in a pass.
    assert waits.found == (["aten::is_nonzero"] if name == "mpnet" else [])


def test_waiting_is_noticed():
    with Waits() as waits:
        rows = torch.arange(4, device=DEVICE)
        rows[rows > 1], rows.sum().item(), (rows > 1).nonzero()
    assert len(waits.found) == 3


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_kernels_change_no_number_of_any_family(name, tmp_path):
    checkpoint = Checkpoint.read(families.FAMILIES[name](tmp_path / name))
    forward = unfused(checkpoint, name)
    with torch.inference_mode():
        before, image = forward(two_texts()), image_of(forward.model, checkpoint)
        count = fuse(forward.model)
        after, same_image = forward(two_texts()), image_of(forward.model, checkpoint)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(same_image, image, atol=1e-5, rtol=1e-5)
    assert before.std() > 0.1, "else this shows nothing"
    assert stand_ins(forward.model) == EXPECTED[name]
    assert count >= sum(EXPECTED[name].values()) - EXPECTED[name].get("Part", 0)


def _forgets_the_residual(self, hidden_states, input_tensor):
    return on_gpu.layer_norm(hidden_states[0], self.weight, self.bias, self.eps)[None]


def _takes_the_wrong_half(self, hidden_states):
    y = self.gate_up(hidden_states)[0]
    return self.down(on_gpu.gated_activation(y, activation=self.activation, is_gate_first=False))[None]


def _does_not_compile(self, x):
    raise SyntaxError("as triton's own errors, it is not a RuntimeError")


@pytest.mark.parametrize(
    ("name", "kind", "wrong"),
    [
        ("bert", on_gpu.Residual, _forgets_the_residual),
        ("qwen3", on_gpu.Gated, _takes_the_wrong_half),
        ("modernbert", on_gpu.LayerNorm, _does_not_compile),
    ],
)
def test_a_stand_in_that_is_wrong_is_found_out_at_load(name, kind, wrong, tmp_path, monkeypatch, caplog):
    checkpoint = Checkpoint.read(families.FAMILIES[name](tmp_path / name))
    family = family_of(checkpoint)
    monkeypatch.setattr(kind, "forward", wrong)
    with caplog.at_level(logging.WARNING):
        forward = choose_forward(
            lambda attention: family.load(checkpoint, attention, torch.float32, DEVICE),
            family,
            dict(checkpoint.config),
            name,
        )
    assert "other numbers with fused layers" in caplog.text
    assert stand_ins(forward.model) == {}


def test_only_the_model_that_is_fused_turns_by_the_kernel(tmp_path):
    checkpoint = Checkpoint.read(checkpoints.llama(tmp_path / "m"))
    plain = modeling_llama.apply_rotary_pos_emb
    fused, other = unfused(checkpoint, "llama"), unfused(checkpoint, "llama")
    fuse(fused.model)
    assert stand_ins(fused.model)["rotary"] == 3
    assert stand_ins(other.model) == {}
    assert modeling_llama.apply_rotary_pos_emb is plain


def test_what_is_no_packed_row_is_turned_as_before():
    plain = modeling_llama.apply_rotary_pos_emb
    numbers = torch.linspace(0, 9, 2 * 3 * 5 * 8).sin().to(DEVICE)
    q, cos = numbers.view(2, 3, 5, 8), numbers[:80].view(2, 5, 8)
    expected = plain(q, q[:, :1], cos, cos / 2)
    got = rotary._kernel_or(plain)(q, q[:, :1], cos, cos / 2)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_functions_that_turn_otherwise_are_not_known():
    def neighbours(q, k, cos, sin, unsqueeze_dim=1):
        def turn(x):
            other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
            return x * cos[:, None] + other * sin[:, None]

        return turn(q), turn(k)

    def of_images(q, k, cos, sin):
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)

    assert rotary._is_known(modeling_llama.apply_rotary_pos_emb)
    assert not rotary._is_known(neighbours)
    assert not rotary._is_known(of_images)


@pytest.mark.parametrize(("kind", "adds_one"), [(LlamaRMSNorm, False), (GemmaRMSNorm, True)])
def test_norms_are_told_apart_by_what_they_compute(kind, adds_one):
    """Also where a weight is so large that half precision would not show the one."""
    norm = kind(32).to(torch.bfloat16)
    torch.nn.init.constant_(norm.weight, 300)
    assert on_gpu._rms_norm(norm).adds_one is adds_one


def test_a_norm_that_computes_something_else_stays():
    class HalfRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) / 2

    assert on_gpu._rms_norm(HalfRMSNorm(32)) is None


def test_layers_that_became_one_share_its_memory():
    layers = [torch.nn.Linear(8, size) for size in (8, 4)]
    joint = on_gpu.JointLinear(layers)
    assert layers[1].weight.data_ptr() == joint.weight[8:].data_ptr()
    assert layers[1].bias.data_ptr() == joint.bias[8:].data_ptr()
