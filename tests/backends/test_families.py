"""Every registered family against transformers: packed == padded == one by one, in float32."""

import json
import logging

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModel, MPNetConfig, MPNetModel

from backends.checkpoint import Checkpoint
from backends.encode import encode
from backends.errors import CheckpointError
from backends.families import FAMILIES, family_of
from backends.forward import PackedForward, PaddedForward, row_size
from backends.ragged import Ragged, cut_by_budget
from backends.self_check import choose_forward
from tests.support import checkpoints, families
from tests.support.pipeline import load_forward

# Their classes take no attention function.
PADDED = ("deberta", "mpnet")
LENGTHS = (5, 11, 3, 11, 1)


@pytest.fixture(params=sorted(FAMILIES))
def checkpoint(request, tmp_path):
    return Checkpoint.read(families.FAMILIES[request.param](tmp_path / request.param))


def batch_of(checkpoint, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    vocabulary = checkpoint.language_config["vocab_size"]
    return Ragged.pack([torch.randint(5, vocabulary, (n,), generator=generator) for n in lengths])


def padded_reference(checkpoint, batch):
    """transformers' own padded forward with its own attention."""
    model = AutoModel.from_pretrained(
        checkpoint.path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    model = getattr(model, "text_model", model)
    ids = torch.nn.utils.rnn.pad_sequence(batch.split(), batch_first=True)
    mask = (torch.arange(ids.shape[1])[None] < torch.from_numpy(batch.lengths)[:, None]).long()
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]


def run(forward, batch, max_batch_tokens=10_000):
    with torch.inference_mode():
        return encode(forward, batch, max_batch_tokens, torch.float32)


def test_packed_equals_transformers_padded(checkpoint):
    forward = load_forward(checkpoint)
    assert forward.is_packed == (family_of(checkpoint).name not in PADDED)
    batch = batch_of(checkpoint)
    torch.testing.assert_close(run(forward, batch), padded_reference(checkpoint, batch), atol=1e-5, rtol=1e-5)
    if forward.is_packed:
        assert forward.attention_calls == 3, "once for each layer"


def test_packed_equals_one_by_one_and_every_cut(checkpoint):
    forward = load_forward(checkpoint)
    batch = batch_of(checkpoint)
    whole = run(forward, batch)
    alone = torch.cat([run(forward, Ragged.pack([one])) for one in batch.split()])
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=1e-5)
    for budget in (1, 6, 12, 23):
        torch.testing.assert_close(run(forward, batch, budget), whole, atol=1e-5, rtol=1e-5)


def test_blind_tokens_are_not_looked_at(checkpoint):
    """The first tokens come out as if the blind ones behind them were not there."""
    forward = load_forward(checkpoint)
    batch = batch_of(checkpoint)
    keys = np.array([3, 11, 1, 4, 1])
    with torch.inference_mode():
        got = encode(forward, batch, 10_000, torch.float32, keys)
    cut = Ragged.pack([one[:n] for one, n in zip(batch.split(), keys, strict=True)])
    seen = torch.cat([one[:n] for one, n in zip(torch.split(got, batch.lengths.tolist()), keys, strict=True)])
    torch.testing.assert_close(seen, run(forward, cut), atol=1e-5, rtol=1e-5)
    assert (got - run(forward, batch)).abs().max() > 0.1, "else nothing was hidden"


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(PADDED)))
def test_a_short_row_is_filled_up_to_one_of_few_sizes_and_nothing_changes(tmp_path, monkeypatch, name):
    checkpoint = Checkpoint.read(families.FAMILIES[name](tmp_path / name))
    packed = load_forward(checkpoint)
    sizes = []
    original = packed.run

    def run_and_note(lengths, **given):
        sizes.append(given["input_ids"].shape[1])
        return original(lengths, **given)

    monkeypatch.setattr(packed, "run", run_and_note)
    batches = [batch_of(checkpoint, lengths) for lengths in ((5, 11, 3), (1,), (40, 1), (24, 8))]
    filled = [run(packed, batch) for batch in batches]
    assert sizes == [24, 8, 48, 32]
    packed.fills_rows = False
    sizes.clear()
    for batch, states in zip(batches, filled, strict=True):
        torch.testing.assert_close(states, run(packed, batch), atol=1e-5, rtol=1e-5)
    assert sizes == [19, 1, 41, 32]


def test_rows_have_few_sizes_and_long_ones_their_own():
    assert len({row_size(n) for n in range(1, 257)}) == 24
    assert all(0 <= row_size(n) - n < 16 for n in range(1, 1000))
    assert [row_size(n) for n in (257, 2047)] == [257, 2047]


def test_long_rows_are_filled_up_where_their_products_are_compiled_too():
    def size(n_tokens):
        return row_size(n_tokens, fills_long=True)

    assert [size(n) for n in (200, 256, 257, 512, 513, 1024, 1025, 4095)] == [
        208,
        256,
        272,
        512,
        544,
        1024,
        1088,
        4096,
    ]
    assert len({size(n) for n in range(1, 4097)}) == 24 + 4 * 16
    assert all(0 <= size(n) - n < n / 16 for n in range(257, 4097))


def test_a_padded_pass_counts_its_padding():
    lengths = np.array([3, 100, 3, 3, 50])
    packed = [order.tolist() for order in cut_by_budget(lengths, 120)]
    padded = [order.tolist() for order in cut_by_budget(lengths, 120, is_padded=True)]
    assert packed == [[1], [4, 0, 2, 3]]
    assert padded == [[1], [4, 0], [2, 3]]


def test_negative_control_a_lost_boundary_shows(checkpoint):
    batch = batch_of(checkpoint)
    merged = Ragged(batch.values, np.array([sum(LENGTHS)]))
    difference = run(load_forward(checkpoint), merged) - padded_reference(checkpoint, batch)
    assert difference.abs().max() > 0.1


def test_bfloat16_stays_close(checkpoint):
    batch = batch_of(checkpoint)
    exact = run(load_forward(checkpoint), batch)
    rounded = run(load_forward(checkpoint, torch.bfloat16), batch)
    assert torch.nn.functional.cosine_similarity(exact, rounded).min() > 0.99


@pytest.mark.parametrize("name", sorted(name for name, family in FAMILIES.items() if family.vision is None))
def test_the_padded_way_equals_it_too(tmp_path, name):
    checkpoint = Checkpoint.read(families.FAMILIES[name](tmp_path / name))
    family = FAMILIES[name]
    model = family.load(checkpoint, None, torch.float32, torch.device("cpu"))
    batch = batch_of(checkpoint)
    padded = run(PaddedForward(model, family, dict(checkpoint.config)), batch)
    torch.testing.assert_close(padded, padded_reference(checkpoint, batch), atol=1e-5, rtol=1e-5)


def test_missing_weights_are_refused(checkpoint):
    model = AutoModel.from_pretrained(checkpoint.path)
    state = {name: value for name, value in model.state_dict().items() if "norm" not in name.lower()}
    model.save_pretrained(checkpoint.path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"lacks \d+ weights of a .*; the download was cut short"):
        load_forward(checkpoint)


def test_broken_weights_are_refused(checkpoint):
    file = checkpoint.path / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    cut = {name: weight[..., :1].clone() if weight.ndim else weight for name, weight in weights.items()}
    safetensors.torch.save_file(cut, file)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_forward(checkpoint)


def test_an_unknown_model_type_lists_the_known_ones(tmp_path):
    path = checkpoints.bert(tmp_path / "c")
    checkpoints.write_json(
        path / "config.json", {"model_type": "frobnicator", "hidden_size": 32, "max_position_embeddings": 9}
    )
    with pytest.raises(
        CheckpointError, match=r"is a 'frobnicator' model .* the model types served are: albert, bert"
    ):
        family_of(Checkpoint.read(path))
    with pytest.raises(CheckpointError, match=r"--model-type is 'bert', but .* says 'frobnicator'"):
        family_of(Checkpoint.read(path), "bert")


def test_a_config_without_model_type_takes_the_given_one(tmp_path):
    path = checkpoints.bert(tmp_path / "c")
    expected = load_forward(Checkpoint.read(path))
    content = json.loads((path / "config.json").read_text())
    del content["model_type"]
    checkpoints.write_json(path / "config.json", content)
    checkpoint = Checkpoint.read(path)
    with pytest.raises(CheckpointError, match="has no model_type; give it with --model-type"):
        family_of(checkpoint)
    family = family_of(checkpoint, "bert")
    model = family.load(checkpoint, "packed", torch.float32, torch.device("cpu"))
    batch = batch_of(checkpoint)
    got = run(PackedForward(model, family, content), batch)
    torch.testing.assert_close(got, run(expected, batch))


# MPNet takes no attention function: packed, every sequence would look at its neighbours, without any error.
MPNET = FAMILIES["mpnet"]


def rewrite(path, **changes):
    """Changes entries of config.json; None takes one out."""
    config = {**json.loads((path / "config.json").read_text()), **changes}
    checkpoints.write_json(path / "config.json", {n: v for n, v in config.items() if v is not None})
    return Checkpoint.read(path)


def as_new_model(path, theta, **changes):
    """The layout of Alibaba-NLP's own repositories: another model_type, and a prefix on every tensor."""
    weights = safetensors.torch.load_file(path / "model.safetensors")
    renamed = {f"new.{name}": value for name, value in weights.items()}
    safetensors.torch.save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    return rewrite(path, model_type="new", rope_parameters=None, rope_theta=theta, **changes)


def test_gte_of_the_original_repositories(tmp_path):
    native = Checkpoint.read(checkpoints.gte(tmp_path / "native"))
    batch = batch_of(native)
    expected = run(load_forward(native), batch)
    path = checkpoints.gte(tmp_path / "new")
    original = as_new_model(path, 160000.0, architectures=["NewModel"])
    torch.testing.assert_close(run(load_forward(original), batch), expected)
    stretched = rewrite(path, rope_scaling={"type": "ntk", "factor": 2.0})
    got = run(load_forward(stretched), batch)
    assert (got - expected).abs().max() > 0.01, "positions are stretched"
    # The same by hand: a head has 8 components.
    model = load_forward(native).model
    powers = torch.arange(0, 8, 2) / 8
    model.rotary_emb.inv_freq.copy_(1 / (320000.0**powers) / 2 ** (2 / 8))
    by_hand = run(PackedForward(model, family_of(native), dict(native.config)), batch)
    torch.testing.assert_close(got, by_hand)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_scaling"),
        ({"rope_scaling": {"type": "ntk", "factor": 2, "mixed_b": 0.3}}, "rope_scaling"),
        ({"logn_attention_scale": True}, "logn_attention_scale True, which is not served; it takes False"),
        ({"position_embedding_type": "absolute"}, "position_embedding_type 'absolute'"),
    ],
)
def test_gte_variants_that_would_give_wrong_numbers_are_refused(tmp_path, changes, message):
    checkpoint = as_new_model(checkpoints.gte(tmp_path / "c"), 160000.0, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_forward(checkpoint)


def test_nomic_bert_of_the_original_repositories(tmp_path):
    native = Checkpoint.read(checkpoints.nomic_bert(tmp_path / "native"))
    batch = batch_of(native)
    expected = run(load_forward(native), batch)
    path = checkpoints.nomic_bert(tmp_path / "original")
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "rope_parameters",
    )
    gpt2 = {
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 64,
        "n_positions": 8192,
        "rotary_emb_base": 1000,
    }
    gone = dict.fromkeys((*names, "max_position_embeddings", "layer_norm_eps"))
    original = rewrite(path, **gone, **gpt2, layer_norm_epsilon=1e-12, activation_function="swiglu")
    assert (original.hidden_size, original.positions) == (32, 8192)
    torch.testing.assert_close(run(load_forward(original), batch), expected)
    with pytest.raises(CheckpointError, match="num_experts 8, which is not served"):
        load_forward(rewrite(path, num_experts=8))
    other = run(load_forward(rewrite(path, rotary_emb_base=50, num_experts=None)), batch)
    assert (other - expected).abs().max() > 0.01, "theta is read"


def mpnet():
    config = MPNetConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return checkpoints.randomize(MPNetModel(config, add_pooling_layer=False))


def test_a_model_without_attention_interface_falls_back_to_padding(caplog):
    model = mpnet()
    with caplog.at_level(logging.WARNING):
        forward = choose_forward(lambda attention: model, MPNET, {"pad_token_id": 1}, "tiny-mpnet")
    assert not forward.is_packed
    assert "tiny-mpnet cannot run packed (MPNetModel takes no attention function)" in caplog.text
    batch = Ragged.pack([torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10, 11])])
    alone = torch.cat([run(forward, Ragged.pack([one])) for one in batch.split()])
    torch.testing.assert_close(run(forward, batch), alone, atol=1e-5, rtol=1e-5)
    packed = run(PackedForward(model, MPNET, {}), batch)
    assert (packed - alone).abs().max() > 0.1, "packing this model must be wrong, or the check shows nothing"


def test_a_model_that_packs_wrong_numbers_falls_back_too(tmp_path, caplog):
    """It calls the attention function, but something else in it looks over the boundary."""
    checkpoint = Checkpoint.read(checkpoints.bert(tmp_path / "c"))
    family = family_of(checkpoint)

    def look_over_the_boundary(module, inputs, output):
        return output + output.mean(1, keepdim=True)

    def load(attention):
        model = family.load(checkpoint, attention, torch.float32, torch.device("cpu"))
        if attention is not None:
            model.encoder.layer[0].output.register_forward_hook(look_over_the_boundary)
        return model

    with caplog.at_level(logging.WARNING):
        forward = choose_forward(load, family, dict(checkpoint.config), "mixing")
    assert not forward.is_packed
    assert "between packed and one by one" in caplog.text


class Stateful(torch.nn.Module):
    """Gives other numbers at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 8)
        self.calls = 0

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, **_):
        self.calls += 1
        hidden = self.embedding(input_ids) * self.calls

        class Output:
            last_hidden_state = hidden

        return Output


def test_a_model_that_fails_both_ways_is_refused(caplog):
    with pytest.raises(
        CheckpointError, match=r"gives other numbers in a batch than alone, packed .* and padded"
    ):
        choose_forward(lambda attention: Stateful(), MPNET, {}, "odd")


def test_an_input_over_the_budget_runs_alone(checkpoint):
    forward = load_forward(checkpoint)
    passes = []

    def watched(ids, keys=None, firsts=None, images=None):
        passes.append(ids.lengths.tolist())
        return forward(ids)

    watched.is_packed, watched.shares_prefixes, watched.device = True, False, torch.device("cpu")
    with torch.inference_mode():
        encode(watched, batch_of(checkpoint), 6, torch.float32)
    assert passes == [[11], [11], [5], [3, 1]]


def test_code_of_a_checkpoint_is_not_run_for_a_family_that_is_known(tmp_path):
    path = checkpoints.gte(tmp_path / "c")
    (path / "modeling_x.py").write_text("raise SystemExit('this must not run')")
    checkpoint = rewrite(path, auto_map={"AutoModel": "modeling_x.X", "AutoConfig": "modeling_x.Y"})
    assert load_forward(checkpoint).is_packed
