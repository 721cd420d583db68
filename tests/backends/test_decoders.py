"""Embedding models made of decoders against sentence-transformers, and the traps of each."""

import json
import logging
import warnings

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from backends.checkpoint import Checkpoint
from backends.contract import ErrorCode
from backends.errors import CheckpointError, OptionError, RequestError
from backends.families import FAMILIES, family_of
from backends.instruction import instruction_template
from backends.options import ServingOptions
from backends.repository.pipeline import build_pipeline
from backends.tokenization import TextTokenizer
from backends.tokenizer_settings import TokenizerSettings
from tests.support import checkpoints, decoders, families
from tests.support.pipeline import embed
from tests.support.vocabularies import write_json

TEXTS = [
    "the value of this class",
    "x",
    "return it; for and of to the query: value class object in a of to (Äß 12)",
]
TASK = "Retrieve the value"
TOLERANCE = 1e-5
EOS = {"add_eos_token": True, "add_bos_token": True}


def reference(path, is_causal=None, **processor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SentenceTransformer(
            str(path), device="cpu", local_files_only=True, processor_kwargs=processor
        )
    if is_causal is not None:
        model[0].model.config.is_causal = is_causal
    return model


LAYOUTS = {
    "e5-mistral": (decoders.e5_mistral, None, EOS, "Instruct: {}\nQuery: "),
    "gte-qwen2": (decoders.gte_qwen2, False, {"add_eos_token": True}, "Instruct: {}\nQuery: "),
    "qwen3-embedding": (decoders.qwen3_embedding, None, {}, "Instruct: {}\nQuery:"),
}


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path):
    make, is_causal, processor, template = LAYOUTS[request.param]
    path = make(tmp_path / request.param)
    return path, reference(path, is_causal, **processor), template


def test_equals_sentence_transformers(layout):
    path, model, template = layout
    np.testing.assert_allclose(embed(path, TEXTS), model.encode(TEXTS), atol=TOLERANCE)
    name = "query" if model.prompts.get("query") else "web_search_query"
    for parameters in ({"prompt_name": name}, {"prompt_name": "query"}, {"role": "query"}):
        expected = model.encode(TEXTS, prompt_name=name)
        np.testing.assert_allclose(embed(path, TEXTS, parameters), expected, atol=TOLERANCE)
    for parameters in ({"instruction": TASK}, {"instruction": TASK, "role": "query"}):
        expected = model.encode(TEXTS, prompt=template.format(TASK))
        np.testing.assert_allclose(embed(path, TEXTS, parameters), expected, atol=TOLERANCE)
    for parameters in ({"prompt_name": "document"}, {"role": "document"}):
        np.testing.assert_allclose(embed(path, TEXTS, parameters), model.encode(TEXTS), atol=TOLERANCE)
    np.testing.assert_allclose(
        embed(path, TEXTS, {"dimensions": 8}),
        model.encode(TEXTS, truncate_dim=8, normalize_embeddings=True),
        atol=TOLERANCE,
    )


def test_truncation_keeps_the_last_token(layout):
    path, model, _ = layout
    texts = ["the value " * 400, "of this class"]
    np.testing.assert_allclose(embed(path, texts), model.encode(texts), atol=TOLERANCE)


def test_one_by_one_and_every_cut(layout):
    path = layout[0]
    whole = embed(path, TEXTS)
    alone = np.concatenate([embed(path, [text]) for text in TEXTS])
    np.testing.assert_allclose(whole, alone, atol=TOLERANCE)
    np.testing.assert_allclose(embed(path, TEXTS, max_batch_tokens=8), alone, atol=TOLERANCE)


def differs(path, expected, least=0.01):
    return np.abs(embed(path, TEXTS) - expected).max() > least


def test_negative_control_without_the_last_token(tmp_path):
    mistral = decoders.e5_mistral(tmp_path / "e5")
    expected = embed(mistral, TEXTS)
    # What transformers 5 makes of the published files when nobody asks for it.
    np.testing.assert_array_less(0.01, np.abs(reference(mistral).encode(TEXTS) - expected).max(1))
    config = json.loads((mistral / "tokenizer_config.json").read_text())
    write_json(mistral / "tokenizer_config.json", {**config, "add_eos_token": False})
    assert differs(mistral, expected)
    gte = decoders.gte_qwen2(tmp_path / "gte")
    expected = embed(gte, TEXTS)
    assert np.abs(reference(gte, False).encode(TEXTS) - expected).max() > 0.01
    bare = decoders.gte_qwen2(tmp_path / "bare", adds_eos=False)
    np.testing.assert_allclose(embed(bare, TEXTS), expected, err_msg="the model says it, not the tokenizer")
    decoders.change_config(bare, auto_map=None, is_causal=False)
    assert differs(bare, expected), "and only this model"


def test_negative_control_with_the_wrong_causality(tmp_path):
    gte = decoders.gte_qwen2(tmp_path / "gte")
    expected = embed(gte, TEXTS)
    assert np.abs(reference(gte, True, add_eos_token=True).encode(TEXTS) - expected).max() > 0.01
    decoders.change_config(gte, is_causal=True)
    causal = embed(gte, TEXTS)
    assert np.abs(causal - expected).max() > 0.01
    np.testing.assert_allclose(causal, reference(gte, True, add_eos_token=True).encode(TEXTS), atol=TOLERANCE)


def test_negative_control_with_the_other_family_s_blank(layout):
    path, model, template = layout
    other = template[:-1] if template.endswith(" ") else template + " "
    got = embed(path, TEXTS, {"instruction": TASK})
    assert np.abs(got - model.encode(TEXTS, prompt=other.format(TASK))).max() > 0.01


@pytest.mark.parametrize("family", sorted(name for name, family in FAMILIES.items() if family.is_decoder))
@pytest.mark.parametrize("is_causal", [True, False])
def test_both_ways_of_every_decoder(tmp_path, family, is_causal):
    from backends.encode import encode
    from backends.ragged import Ragged
    from backends.self_check import choose_forward

    # Of a window both ways transformers' own functions disagree about the last token of it.
    settings = {"window": None} if family == "mistral" else {}
    path = families.FAMILIES[family](tmp_path / "c", **settings)
    checkpoint = Checkpoint.read(path)
    own = family_of(checkpoint)
    causality = own.causality(checkpoint.config, is_causal)

    def load(attention):
        return own.load(checkpoint, attention, torch.float32, torch.device("cpu"), causality)

    forward = choose_forward(load, own, dict(checkpoint.config), "c")
    assert forward.is_packed
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(5, 300, (n,), generator=generator) for n in (9, 4, 13)]
    reference_model = load("eager")
    with torch.inference_mode():
        got = encode(forward, Ragged.pack(rows), 1000, torch.float32).split([9, 4, 13])
        for row, ours in zip(rows, got, strict=True):
            theirs = reference_model(row[None], use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        changed = rows[0].clone()
        changed[-1] = 4
        first = encode(forward, Ragged.pack([changed]), 1000, torch.float32)[0]
    assert torch.allclose(first, got[0][0], atol=1e-5) == is_causal, "the last token shows in the first"


@pytest.mark.parametrize(
    ("entries", "wanted", "model_type", "expected", "reason"),
    [
        ({}, None, None, True, "qwen2 models are"),
        ({"is_causal": False}, None, None, False, "config.json says is_causal false"),
        ({"auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}}, None, None, False, "gte-Qwen2's code"),
        (
            {"auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}, "is_causal": True},
            None,
            None,
            True,
            "config.json says is_causal true",
        ),
        ({"auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}}, True, None, True, "--causal"),
        ({}, False, None, False, "--no-causal"),
        ({}, None, "qwen_2_embedding", False, "--model-type qwen_2_embedding"),
        ({"is_causal": True}, None, "qwen_2_embedding", False, "--model-type qwen_2_embedding"),
        ({}, True, "qwen_2_embedding", True, "--causal"),
        (
            {"auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}, "is_causal": True},
            None,
            "qwen2",
            True,
            "config.json says is_causal true",
        ),
        ({}, None, "qwen_2", True, "qwen2 models are"),
    ],
)
def test_who_says_whether_it_is_causal(entries, wanted, model_type, expected, reason):
    found = FAMILIES["qwen2"].causality(entries, wanted, model_type)
    assert found.is_causal == expected
    assert reason in found.reason


def test_the_disputed_size_is_told(tmp_path):
    path = decoders.gte_qwen2(tmp_path / "c")
    checkpoint = Checkpoint.read(path)
    notes = build_pipeline("gte", str(path), checkpoint, ServingOptions()).notes
    assert notes == (
        "its tokens look both ways: config.json names gte-Qwen2's code, modeling_qwen.Qwen2Model",
    )
    disputed = FAMILIES["qwen2"].causality({**checkpoint.config, "hidden_size": 1536})
    assert not disputed.is_causal
    assert "--causal gives" in disputed.reason
    assert build_pipeline("gte", str(path), checkpoint, ServingOptions(causal=True)).notes == ()


def test_an_encoder_is_neither():
    with pytest.raises(OptionError, match="bert models are encoders, whose tokens look both ways"):
        FAMILIES["bert"].causality({}, True)
    assert FAMILIES["bert"].causality({}) is None


def test_rtp_llm_s_names(tmp_path):
    checkpoint = Checkpoint.read(decoders.gte_qwen2(tmp_path / "gte"))
    assert family_of(checkpoint, "qwen_2_embedding").name == "qwen2"
    assert family_of(checkpoint, "qwen_2").name == "qwen2"
    with pytest.raises(CheckpointError, match="--model-type is 'qwen_3', but"):
        family_of(checkpoint, "qwen_3")


@pytest.mark.parametrize("name", ["query", "document"])
def test_names_of_prompts_without_prompts(tmp_path, name):
    path = decoders.e5_mistral(tmp_path / "c")
    write_json(path / "config_sentence_transformers.json", {})
    assert settings_of(path, prompt_name=name).prompt == ""
    assert settings_of(path, instruction="a").prompt == "Instruct: a\nQuery: "
    with pytest.raises(RequestError, match="prompt_name is 'other', which this model does not have"):
        settings_of(path, prompt_name="other")


def test_a_config_without_model_type_takes_the_given_one(tmp_path):
    path = decoders.e5_mistral(tmp_path / "c")

    def hidden():
        checkpoint = Checkpoint.read(path)
        model = family_of(checkpoint, "mistral").load(checkpoint, None, torch.float32, torch.device("cpu"))
        with torch.inference_mode():
            return model(torch.arange(5, 25)[None], use_cache=False).last_hidden_state

    expected = hidden()
    decoders.change_config(path, model_type=None)
    torch.testing.assert_close(hidden(), expected)
    decoders.change_config(path, sliding_window=None)
    assert (hidden() - expected).abs().max() > 0.01, "its config.json is read"


def test_an_instruction_that_fills_the_model_is_named_as_such(tmp_path):
    path = decoders.e5_mistral(tmp_path / "c")
    tokenizer = TextTokenizer(Checkpoint.read(path), 64)
    with pytest.raises(RequestError) as refused:
        tokenizer.encode([b"a"], settings_of(path, instruction="a " * 200))
    assert refused.value.failure.code is ErrorCode.INVALID_INSTRUCTION


def test_the_parameter_of_the_option_comes_back():
    for causal in (True, False, None):
        options = ServingOptions(causal=causal)
        assert ServingOptions.from_parameters(options.to_parameters()) == options


def settings_of(path, **parameters):
    checkpoint = Checkpoint.read(path)
    template = instruction_template(checkpoint, family_of(checkpoint).instruction)
    return TokenizerSettings.read(parameters, checkpoint, "error", None, template)


@pytest.mark.parametrize(
    ("prompts", "habit", "template"),
    [
        ({}, None, None),
        ({}, "Instruct: {}\nQuery:", "Instruct: {}\nQuery:"),
        ({"query": "Instruct: a b\nQuery: "}, "Instruct: {}\nQuery:", "Instruct: {}\nQuery: "),
        ({"query": "<instruct>a\n<query>"}, None, "<instruct>{}\n<query>"),
        ({"query": "task: search result | query: "}, None, "task: {} | query: "),
        ({"query": "Instruct: a\n{q}: "}, None, "Instruct: {}\n{{q}}: "),
        ({"query": "query: "}, "Instruct: {}\nQuery: ", None),
        ({"sts_query": "Instruct: a\nQuery: ", "other": ""}, None, "Instruct: {}\nQuery: "),
    ],
)
def test_where_an_instruction_stands(tmp_path, prompts, habit, template):
    path = checkpoints.sentence_transformer(tmp_path / "c", {}, sentence={"prompts": prompts})
    assert instruction_template(Checkpoint.read(path), habit) == template


@pytest.mark.parametrize(
    ("parameters", "code", "text"),
    [
        ({"instruction": "  "}, ErrorCode.INVALID_INSTRUCTION, "takes some words"),
        ({"instruction": 5}, ErrorCode.INVALID_INSTRUCTION, "instruction is 5"),
        ({"instruction": "a", "role": "document"}, ErrorCode.INVALID_INSTRUCTION, "is for queries"),
        ({"instruction": "a", "prompt_name": "document"}, ErrorCode.INVALID_INSTRUCTION, "is for queries"),
        ({"instruction": "a", "prompt_name": "sts_query"}, ErrorCode.INVALID_INSTRUCTION, "give one"),
        ({"instruction": "a", "prompt": "b"}, ErrorCode.INVALID_INSTRUCTION, "instruction and prompt both"),
    ],
)
def test_bad_instructions(tmp_path, parameters, code, text):
    path = decoders.e5_mistral(tmp_path / "c")
    with pytest.raises(RequestError, match=text) as refused:
        settings_of(path, **parameters)
    assert refused.value.failure.code is code


def test_braces_in_an_instruction_are_kept(tmp_path):
    assert settings_of(decoders.e5_mistral(tmp_path / "c"), instruction="{a}").prompt == (
        "Instruct: {a}\nQuery: "
    )


def test_listed_dimensions_are_the_only_ones(tmp_path):
    path = decoders.qwen3_embedding(tmp_path / "c")
    decoders.change_config(path, matryoshka_dimensions=[16, 8])
    assert embed(path, TEXTS, {"dimensions": 8}).shape == (3, 8)
    assert embed(path, TEXTS, {"dimensions": 32}).shape == (3, 32)
    with pytest.raises(RequestError, match="dimensions is 12; this model takes one of 8, 16"):
        embed(path, TEXTS, {"dimensions": 12})
    parameters = build_pipeline("c", str(path), Checkpoint.read(path), ServingOptions()).parameters
    assert parameters["matryoshka_dimensions"] == "8,16"


def test_sharded_weights_of_another_format(tmp_path, caplog):
    path = decoders.qwen3_embedding(tmp_path / "c")
    expected = embed(path, TEXTS)
    from transformers import AutoModel

    model = AutoModel.from_pretrained(path)
    (path / "model.safetensors").unlink()
    with caplog.at_level(logging.ERROR):
        model.save_pretrained(path, max_shard_size="50KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2
    np.testing.assert_allclose(embed(path, TEXTS), expected)


def test_a_tokenizer_without_the_last_token_is_refused(tmp_path):
    path = decoders.gte_qwen2(tmp_path / "c")
    text = (path / "tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>")
    (path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"<\|endoftext\|> belongs behind every text"):
        TextTokenizer(Checkpoint.read(path), 64, last_token="<|endoftext|>")
