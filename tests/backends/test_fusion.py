"""That fusing happens, and that it is undone where it would change numbers; that it changes none for any
family is what test_families.py shows, whose models are all fused.
"""

import logging

import numpy as np
import pytest
import torch

from backends import self_check
from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError, OptionError
from backends.families import FAMILIES, family_of
from backends.forward import register_attention
from backends.fusion import on_cpu
from backends.fusion.layer import PostNormLayer, stand_in
from backends.fusion.parts import Joint, Part
from backends.options import QUANTIZATIONS, ServingOptions
from backends.ragged import Ragged
from backends.self_check import choose_forward
from kernels.half_linear import HalfLinear
from kernels.int8_linear import Int8Linear
from kernels.packed_attention import NAME
from kernels.packed_linear import PackedLinear
from tests.support import checkpoints, families
from tests.support.pipeline import load_forward


def kinds(model, kind):
    return [module for module in model.modules() if type(module) is kind]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_product_of_every_family_is_packed_and_every_layer_of_a_bert_is_one(name, tmp_path):
    forward = load_forward(Checkpoint.read(families.FAMILIES[name](tmp_path / name)))
    assert kinds(forward.model, PackedLinear)
    assert not kinds(forward.model, torch.nn.Linear)
    layers = 3 if name in ("bert", "electra", "roberta", "xlm_roberta") else 0
    assert len(kinds(forward.model, PostNormLayer)) == layers


@pytest.mark.parametrize(
    ("name", "parts", "gated", "residual"),
    [("bert", 9, 0, 6), ("distilbert", 9, 0, 0), ("qwen3", 9, 3, 0), ("gte", 9, 3, 0), ("mpnet", 9, 0, 3)],
)
def test_finds_layers_by_how_they_are_put_together(name, parts, gated, residual, tmp_path):
    """The tiny models have three layers."""
    model = load_forward(Checkpoint.read(families.FAMILIES[name](tmp_path / name))).model
    assert len(kinds(model, Part)) == parts
    assert len(kinds(model, on_cpu.Gated)) == gated
    assert len(kinds(model, on_cpu.Residual)) == residual


@pytest.mark.parametrize(
    "change", ["nothing", "another part", "foreign code", "another attention", "no joint"]
)
def test_a_layer_of_other_parts_stays_as_it_is(change, tmp_path):
    checkpoint = Checkpoint.read(checkpoints.bert(tmp_path / "m"))
    register_attention()
    model = family_of(checkpoint).load(
        checkpoint, None if change == "another attention" else NAME, torch.float32, torch.device("cpu")
    )
    layer = model.encoder.layer[0]
    attention = layer.attention.self
    if change != "no joint":
        names = ("query", "key", "value")
        joint = Joint(PackedLinear([getattr(attention, n) for n in names], keeps_plain=False), [32] * 3)
        for index, name in enumerate(names):
            setattr(attention, name, Part(joint, index))
    if change == "another part":
        layer.crossattention = torch.nn.Identity()
    elif change == "foreign code":
        layer.__class__ = type("BertLayer", (type(layer),), {"__module__": "transformers_modules.x"})
    found = stand_in(layer)
    assert (found is not None) == (change == "nothing")
    if found is not None:
        x = torch.randn(1, 7, 32)
        with torch.inference_mode():
            expected = layer(x, None, sequence_lengths=[4, 3])
            torch.testing.assert_close(found(x, None, sequence_lengths=[4, 3]), expected)
            assert (found(x, None, sequence_lengths=[3, 4]) - expected).abs().max() > 1e-4


def test_parts_of_one_product_belong_to_their_own_input():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, size).requires_grad_(False) for size in (8, 4, 4)]
    joint = Joint(PackedLinear(layers, keeps_plain=False), [8, 4, 4])
    first, second = torch.randn(3, 8), torch.randn(3, 8)
    # Two inputs in turn, as in cross-attention.
    got = [joint.part(i, x) for i, x in ((0, first), (1, second), (2, second))]
    expected = [layers[0](first), layers[1](second), layers[2](second)]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)
    assert joint.input is None


def test_a_model_that_means_something_else_by_these_names_stays_as_it_is(tmp_path, monkeypatch, caplog):
    checkpoint = Checkpoint.read(checkpoints.bert(tmp_path / "m"))
    ids = torch.arange(5, 14)[None]

    def wrong(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dense(hidden_states, residual=-input_tensor))

    with torch.inference_mode():
        plain = load_forward(checkpoint).model(ids, sequence_lengths=[9]).last_hidden_state
    monkeypatch.setattr(on_cpu.Residual, "forward", wrong)
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        forward = load_forward(checkpoint)
        kept = forward.model(ids, sequence_lengths=[9]).last_hidden_state
    assert "other numbers with fused layers" in caplog.text
    assert not kinds(forward.model, PackedLinear)
    torch.testing.assert_close(kept, plain, atol=1e-5, rtol=1e-5)


def test_long_rows_are_filled_up_where_all_products_are_compiled(tmp_path, monkeypatch):
    checkpoint = Checkpoint.read(checkpoints.bert(tmp_path / "m"))
    assert not load_forward(checkpoint).fills_long_rows
    assert quantized(checkpoint).fills_long_rows
    assert not quantized(checkpoint, "float16").fills_long_rows
    monkeypatch.setattr(on_cpu, "_MOST_KEPT_BYTES", 0)
    filled = load_forward(checkpoint)
    assert filled.fills_long_rows
    lengths = np.array([30] * 9)
    ids = Ragged(torch.arange(lengths.sum()) % 90 + 5, lengths)
    assert filled.padding(lengths) == 272 - 270
    with torch.inference_mode():
        got = filled(ids)
        filled.fills_rows = False
        torch.testing.assert_close(got, filled(ids), atol=1e-5, rtol=1e-5)


def quantized(checkpoint, quantization="int8", dtype=torch.float32):
    family = family_of(checkpoint)
    causality = family.causality(checkpoint.config)

    def load(attention):
        return family.load(checkpoint, attention, dtype, torch.device("cpu"), causality)

    return choose_forward(load, family, dict(checkpoint.config), "tiny", quantization=quantization)


@pytest.mark.parametrize("name", ["bert", "qwen3", "mpnet"])
def test_int8_stays_near_float32(name, tmp_path):
    checkpoint = Checkpoint.read(families.FAMILIES[name](tmp_path / name))
    forward = quantized(checkpoint)
    assert kinds(forward.model, Int8Linear)
    assert not kinds(forward.model, PackedLinear)
    ids = Ragged.pack([torch.arange(5, 5 + n) for n in (9, 4)])
    with torch.inference_mode():
        got, expected = forward(ids), load_forward(checkpoint)(ids)
        alone = torch.cat([forward(Ragged.pack([one])) for one in ids.split()])
    cosines = torch.nn.functional.cosine_similarity(got, expected, dim=-1)
    assert 0.97 < cosines.min() < 1 - 1e-7, "not the same numbers, but nearly"
    torch.testing.assert_close(got, alone, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_weights_in_float16_change_the_fourth_digit_of_every_family(name, tmp_path):
    checkpoint = Checkpoint.read(families.FAMILIES[name](tmp_path / name))
    forward = quantized(checkpoint, "float16")
    assert kinds(forward.model, HalfLinear)
    assert not kinds(forward.model, PackedLinear) + kinds(forward.model, torch.nn.Linear)
    ids = Ragged.pack([torch.arange(5, 5 + n) for n in (9, 4)])
    with torch.inference_mode():
        got, expected = forward(ids), load_forward(checkpoint)(ids)
        alone = torch.cat([forward(Ragged.pack([one])) for one in ids.split()])
    error = (got - expected).norm() / expected.norm()
    assert 1e-6 < error < 2e-3, "not the same numbers, but nearly"
    torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-5)


def test_every_quantization_that_can_be_asked_for_has_a_product_and_a_tolerance():
    assert (
        set(QUANTIZATIONS) - {"auto", "none"} == set(on_cpu.QUANTIZED) == set(self_check._QUANTIZED_TOLERANCE)
    )


@pytest.mark.parametrize("quantization", ["int8", "float16"])
def test_quantization_is_refused_where_it_cannot_be_had(quantization, tmp_path, monkeypatch):
    checkpoint = Checkpoint.read(checkpoints.bert(tmp_path / "m"))
    with pytest.raises(
        CheckpointError, match="takes a CPU for which torch has the products, and weights in float32"
    ):
        quantized(checkpoint, quantization, torch.float16)
    with pytest.raises(OptionError, match="dtype is 'bfloat16'; leave one out"):
        ServingOptions(quantization=quantization, dtype="bfloat16")
    with pytest.raises(
        OptionError, match="quantization is 'int4'; it takes one of auto, none, float16, int8"
    ):
        ServingOptions(quantization="int4")
    wrong = {"int8": Int8Linear, "float16": HalfLinear}[quantization]
    monkeypatch.setattr(
        wrong,
        "forward",
        lambda self, x, residual=None, activation="none": x.new_ones(*x.shape[:-1], self.out_features),
    )
    with pytest.raises(CheckpointError, match=f"gives other numbers quantized to {quantization}"):
        quantized(checkpoint, quantization)


def test_a_weight_that_float16_cannot_hold_is_refused_where_it_was_asked_for(tmp_path, caplog):
    checkpoint = Checkpoint.read(checkpoints.bert(tmp_path / "m"))
    family = family_of(checkpoint)

    def load(attention):
        model = family.load(checkpoint, attention, torch.float32, torch.device("cpu"))
        model.encoder.layer[1].output.dense.weight.data[0, 0] = 7e4
        return model

    def choose(quantization, *, must_quantize=True):
        config = dict(checkpoint.config)
        return choose_forward(
            load, family, config, "tiny", quantization=quantization, must_quantize=must_quantize
        )

    with pytest.raises(
        CheckpointError, match="to float16: a weight is beyond 65504, or not a number; leave --q"
    ):
        choose("float16")
    with caplog.at_level(logging.WARNING):
        forward = choose("float16", must_quantize=False)
    assert "a weight is beyond 65504, or not a number: its weights stay in float32" in caplog.text
    assert kinds(forward.model, PackedLinear)
    assert not kinds(forward.model, HalfLinear)
    ids = Ragged.pack([torch.arange(5, 5 + n) for n in (9, 4)])
    with torch.inference_mode():
        torch.testing.assert_close(forward(ids), choose("none")(ids))
