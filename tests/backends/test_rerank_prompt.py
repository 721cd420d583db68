"""Rerankers that are asked for a word: against the computation of their makers, to the last newline."""

import dataclasses
import functools
import json
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from backends import rerank_prompt
from backends.checkpoint import Checkpoint
from backends.contract import ErrorCode
from backends.errors import CheckpointError, OptionError, RequestError
from backends.families import FAMILIES
from backends.heads.logits import label_activation, labels, score_activation
from backends.options import ServingOptions
from backends.prompt_pieces import Piece, Slot
from backends.repository.pipeline import build_pipeline, heads_of
from backends.rerank_prompt import BGE_GEMMA, MXBAI, QWEN3, rerank_prompt_of
from tests.support import checkpoints, decoders, families
from tests.support.card_rerankers import model_card, mxbai_rerank
from tests.support.checkpoints import classifier, write_json
from tests.support.decoders import (
    PAIR_CHAT,
    change_config,
    converted,
    formatted_pairs,
    with_logit_score,
    with_pair_template,
    without_chat_template,
)
from tests.support.oracle import ask
from tests.support.pipeline import logits, tokenize_for_logits

PAIRS = [
    ("what is the value?", "A class of it"),
    ("x", "this is it; for {and} of to the query return value class object in a of to\n"),
    ("the value of the class", ""),
    ("the value of the class", "Äß \n 12 <Document>: {query}"),
]
TOLERANCE = 1e-5


def quiet(make, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **kwargs)


def probabilities(path, pairs, **parameters):
    return 1 / (1 + np.exp(-logits(path, pairs, parameters)[:, 0]))


def test_qwen3_reranker_equals_the_model_card(tmp_path):
    path = decoders.qwen3_reranker(tmp_path / "c")
    expected = model_card(path, PAIRS)
    np.testing.assert_allclose(probabilities(path, PAIRS), expected, atol=TOLERANCE)
    assert np.ptp(expected) > 0.03, "the pairs must differ"
    alone = np.concatenate([probabilities(path, [pair]) for pair in PAIRS])
    np.testing.assert_allclose(alone, expected, atol=TOLERANCE)
    other = "Find {braces} and more"
    np.testing.assert_allclose(
        probabilities(path, PAIRS, instruction=other), model_card(path, PAIRS, other), atol=TOLERANCE
    )


def test_qwen3_reranker_cuts_as_the_model_card(tmp_path):
    path = decoders.qwen3_reranker(tmp_path / "c", max_length=320)
    pairs = [("the value", "a class of " * 200), ("the value " * 200, "x"), ("x", "y")]
    rows = tokenize_for_logits(Checkpoint.read(path), pairs)
    assert [row.is_truncated for row in rows] == [True, True, False]
    assert len(rows[0].ids) == 320
    assert 316 <= len(rows[1].ids) <= 320
    documents = [pairs[0], pairs[2]]
    np.testing.assert_allclose(
        probabilities(path, documents), model_card(path, documents, max_length=320), atol=TOLERANCE
    )
    # There a long query leaves nothing of the document.
    text = AutoTokenizer.from_pretrained(path).decode(rows[1].ids)
    assert "<Document>: x<|im_end|>" in text


@pytest.mark.parametrize(
    "change",
    [
        lambda piece: piece.replace("</think>\n\n", "</think>\n"),
        lambda piece: piece.replace("<think>\n\n</think>\n\n", ""),
        lambda piece: piece.replace("<Query>: ", "<Query>:"),
        lambda piece: piece.replace("user\n", "user"),
    ],
    ids=["one newline less", "without thinking", "one blank less", "another newline less"],
)
def test_negative_control_a_prompt_that_is_nearly_right(tmp_path, monkeypatch, change):
    path = decoders.qwen3_reranker(tmp_path / "c")
    expected = model_card(path, PAIRS)

    def changed_part(part):
        return change(part) if isinstance(part, str) else part

    pieces = [Piece(tuple(map(changed_part, piece.parts))) for piece in QWEN3.pieces]
    changed = dataclasses.replace(QWEN3, pieces=tuple(pieces))
    assert changed != QWEN3
    monkeypatch.setitem(rerank_prompt.PROMPTS, "qwen3", changed)
    assert np.abs(probabilities(path, PAIRS) - expected).max() > 1e-3


def test_negative_control_the_model_card_with_one_newline_less(tmp_path):
    path = decoders.qwen3_reranker(tmp_path / "c")
    assert np.abs(probabilities(path, PAIRS) - model_card(path, PAIRS, newlines=1)).max() > 1e-3


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_head_s_rows_are_the_right_ones(tmp_path, is_tied):
    path = decoders.qwen3_reranker(tmp_path / "c")
    tied = probabilities(path, PAIRS)
    change_config(path, tie_word_embeddings=is_tied)
    if not is_tied:
        # Some checkpoints tie nothing and have no head all the same: the embeddings stand in.
        np.testing.assert_allclose(probabilities(path, PAIRS), tied, atol=TOLERANCE)
        model = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
        model.save_pretrained(path, max_shard_size="30KB")
        (path / "model.safetensors").unlink()
    np.testing.assert_allclose(probabilities(path, PAIRS), model_card(path, PAIRS), atol=TOLERANCE)


def test_a_pickled_language_model(tmp_path):
    path = decoders.qwen3_reranker(tmp_path / "c")
    expected = logits(path, PAIRS)
    state = AutoModelForCausalLM.from_pretrained(path).state_dict()
    torch.save(state, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    np.testing.assert_allclose(logits(path, PAIRS), expected, atol=1e-6)


def cross_encoder(path, pairs, **options):
    encoder = quiet(
        CrossEncoder, str(path), device="cpu", local_files_only=True, activation_fn=torch.nn.Identity()
    )
    return quiet(encoder.predict, pairs, **options)


def test_the_conversion_equals_the_cross_encoder(tmp_path):
    original = decoders.qwen3_reranker(tmp_path / "o")
    path = converted(tmp_path / "c", original, ("no", "yes"))
    with_chat = logits(path, PAIRS)
    path = without_chat_template(path, tmp_path / "bare")
    np.testing.assert_array_equal(logits(path, PAIRS), with_chat)
    expected = cross_encoder(path, formatted_pairs(PAIRS))
    np.testing.assert_allclose(logits(path, PAIRS)[:, 0], expected, atol=TOLERANCE)
    np.testing.assert_allclose(logits(path, PAIRS), logits(original, PAIRS), atol=TOLERANCE)
    other = logits(path, PAIRS, {"instruction": "Other"})[:, 0]
    np.testing.assert_allclose(other, cross_encoder(path, formatted_pairs(PAIRS, "Other")), atol=TOLERANCE)
    assert np.abs(cross_encoder(path, PAIRS) - expected).max() > 1e-3, "else the prompt does nothing"


def test_the_chat_template_of_a_conversion(tmp_path):
    original = decoders.qwen3_reranker(tmp_path / "o")
    path = with_pair_template(converted(tmp_path / "c", original, ("no", "yes")))
    write_json(
        path / "sentence_bert_config.json",
        {
            "transformer_task": "sequence-classification",
            "modality_config": {
                "text": {"method": "forward", "method_output_name": "logits"},
                "message": {"method": "forward", "method_output_name": "logits", "format": "flat"},
            },
            "module_output_name": "scores",
        },
    )
    write_json(path / "config_sentence_transformers.json", {"model_type": "CrossEncoder"})
    write_json(
        path / "modules.json",
        [
            {
                "idx": 0,
                "name": "0",
                "path": "",
                "type": "sentence_transformers.base.modules.transformer.Transformer",
            }
        ],
    )
    checkpoint = Checkpoint.read(path)
    assert rerank_prompt_of(checkpoint).name == "its chat template's"
    assert list(heads_of(checkpoint, ServingOptions())) == ["logits"]
    np.testing.assert_allclose(logits(path, PAIRS)[:, 0], cross_encoder(path, PAIRS), atol=TOLERANCE)
    expected = cross_encoder(path, PAIRS, prompt="Other")
    np.testing.assert_allclose(logits(path, PAIRS, {"instruction": "Other"})[:, 0], expected, atol=TOLERANCE)


@pytest.mark.parametrize("false", [True, False])
def test_logit_score_equals_the_cross_encoder(tmp_path, false):
    path = decoders.qwen3_reranker(tmp_path / "c")
    true, no = 300, 40
    with_pair_template(with_logit_score(path, true, no if false else None))
    checkpoint = Checkpoint.read(path)
    assert list(heads_of(checkpoint, ServingOptions())) == ["logits"]
    assert labels(checkpoint) == [AutoTokenizer.from_pretrained(path).decode([true]).strip()]
    np.testing.assert_allclose(logits(path, PAIRS)[:, 0], cross_encoder(path, PAIRS), atol=TOLERANCE)
    long = [("the value", "a class of " * 400)]
    np.testing.assert_allclose(logits(path, long)[:, 0], cross_encoder(path, long), atol=TOLERANCE)
    write_json(
        path / "config_sentence_transformers.json",
        {"model_type": "CrossEncoder", "prompts": {"q": "Other {x}"}, "default_prompt_name": "q"},
    )
    np.testing.assert_allclose(logits(path, PAIRS)[:, 0], cross_encoder(path, PAIRS), atol=TOLERANCE)


def test_a_language_model_that_answers_by_its_own_template(tmp_path):
    path = with_pair_template(decoders.qwen3_reranker(tmp_path / "c"))
    np.testing.assert_allclose(logits(path, PAIRS)[:, 0], cross_encoder(path, PAIRS), atol=TOLERANCE)


def test_bge_gemma_equals_flag_llm_reranker(tmp_path):
    path = decoders.bge_gemma(tmp_path / "bge-gemma")
    pairs = [("what is the value", "a class of it"), ("x", "this is it"), ("the value", "x " * 30)]
    expected = ask("flag_llm_reranker", path=str(path), pairs=pairs, max_length=128)
    np.testing.assert_allclose(logits(path, pairs)[:, 0], expected, atol=TOLERANCE)
    assert np.std(expected) > 0.01
    prompt = "Predict Yes or No."
    expected = ask("flag_llm_reranker", path=str(path), pairs=pairs, max_length=128, prompt=prompt)
    np.testing.assert_allclose(logits(path, pairs, {"instruction": prompt})[:, 0], expected, atol=TOLERANCE)


def test_bge_gemma_cuts_as_flag_llm_reranker(tmp_path):
    path = decoders.bge_gemma(tmp_path / "bge-gemma")
    tokenizer = AutoTokenizer.from_pretrained(path)
    query, document = "what is the value", "a class of it " * 40
    expected = ask("flag_llm_reranker", path=str(path), pairs=[(query, document)], max_length=64)
    # There a document has 64 tokens, and the rest comes on top of that.
    rest = ("<bos>", f"A: {query}", "\n", "\n", BGE_GEMMA.default)
    size = 64 + sum(len(tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in rest)
    got = logits(path, [(query, document)], {"max_tokens": size})[:, 0]
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    other = logits(path, [(query, document)], {"max_tokens": size + 1})[:, 0]
    assert np.abs(other - expected).max() > 1e-3, "negative control: one token more"


def test_negative_control_bge_gemma_without_its_first_token(tmp_path, monkeypatch):
    path = decoders.bge_gemma(tmp_path / "c")
    expected = logits(path, PAIRS)
    changed = dataclasses.replace(BGE_GEMMA, pieces=BGE_GEMMA.pieces[1:])
    monkeypatch.setitem(rerank_prompt.PROMPTS, "bge-gemma", changed)
    assert np.abs(logits(path, PAIRS) - expected).max() > 1e-3


@pytest.mark.parametrize("instruction", [None, "Find it"])
def test_mxbai_equals_its_makers_computation(tmp_path, instruction):
    path = decoders.mxbai_v2(tmp_path / "c")
    parameters = {} if instruction is None else {"instruction": instruction}
    expected = mxbai_rerank(path, PAIRS, instruction)
    np.testing.assert_allclose(logits(path, PAIRS, parameters)[:, 0], expected, atol=TOLERANCE)
    assert np.std(expected) > 0.01


def test_mxbai_s_conversion_with_two_labels(tmp_path):
    original = decoders.mxbai_v2(tmp_path / "o")
    path = converted(tmp_path / "c", original, ("0", "1"), ("0", "1"))
    checkpoint = Checkpoint.read(path)
    assert labels(checkpoint) == ["1"]
    np.testing.assert_allclose(logits(path, PAIRS), logits(original, PAIRS), atol=TOLERANCE)


KINDS = ("gemma", "llama", "mistral", "qwen2", "qwen3")


def test_every_decoder_can_be_a_classifier():
    from backends.decoder_head import DECODERS

    # Classifiers of images are not served.
    readers = [family for family in FAMILIES.values() if family.is_decoder and family.vision is None]
    decoding = {kind for family in readers for kind in family.model_types}
    assert decoding == set(DECODERS) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_classifiers_on_decoders(tmp_path, kind):
    path = classifier(tmp_path / "c", functools.partial(families.FAMILIES[kind], pad_token_id=0), 3)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = ["the value of this class", "x", "return it; for and of"]
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    with torch.inference_mode():
        expected = np.concatenate([model(row).logits.numpy() for row in rows])
    np.testing.assert_allclose(logits(path, texts), expected, atol=TOLERANCE)
    assert np.abs(np.roll(expected, 1, axis=0) - expected).max() > 1e-2


def test_the_rightmost_token_that_is_not_padding(tmp_path):
    path = classifier(tmp_path / "c", checkpoints.qwen3, 3)
    pad = json.loads((path / "tokenizer.json").read_text())["added_tokens"][0]["id"]
    change_config(path, pad_token_id=pad)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "the value<|endoftext|><|endoftext|>"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0, -2:].tolist() == [pad, pad]
    with torch.inference_mode():
        expected = model(ids).logits.numpy()
        last = model.score(model.model(ids).last_hidden_state[:, -1]).numpy()
    np.testing.assert_allclose(logits(path, [text]), expected, atol=TOLERANCE)
    np.testing.assert_allclose(logits(path, [text, "x"])[:1], expected, atol=TOLERANCE)
    assert np.abs(last - expected).max() > 1e-3, "negative control: the last token itself"
    only = "<|endoftext|><|endoftext|>"
    with torch.inference_mode():
        first = model(tokenizer(only, return_tensors="pt")["input_ids"]).logits.numpy()
    np.testing.assert_allclose(logits(path, [only]), first, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("make", "prompt"),
    [
        (decoders.qwen3_reranker, QWEN3),
        (decoders.bge_gemma, BGE_GEMMA),
        (decoders.mxbai_v2, MXBAI),
        (decoders.qwen3_embedding, None),
        (decoders.gte_qwen2, None),
        (decoders.e5_mistral, None),
    ],
)
def test_what_a_language_model_is_for(tmp_path, make, prompt):
    path = make(tmp_path / "c")
    checkpoint = Checkpoint.read(path)
    heads = heads_of(checkpoint, ServingOptions())
    if prompt is None:
        assert list(heads) == ["dense", "tokens"]
        return
    assert list(heads) == ["logits"]
    assert f"its prompt is {prompt.name}" in heads["logits"]
    assert rerank_prompt_of(checkpoint) == prompt
    parameters = build_pipeline("c", str(path), checkpoint, ServingOptions()).parameters
    assert parameters["tasks"] == "score,classify"
    assert parameters.get("score_is_probability") == ("true" if prompt is QWEN3 else None)
    assert (score_activation(checkpoint), label_activation(checkpoint)) == ("sigmoid", "sigmoid")
    assert list(heads_of(checkpoint, ServingOptions(task="embed"))) == ["dense"]


def test_an_embedding_model_without_modules_is_known_by_its_last_token(tmp_path):
    path = decoders.qwen3_embedding(tmp_path / "c")
    (path / "modules.json").unlink()
    (path / "1_Pooling" / "config.json").unlink()
    (path / "1_Pooling").rmdir()
    assert list(heads_of(Checkpoint.read(path), ServingOptions())) == ["dense", "tokens"]


def test_a_language_model_that_nothing_is_known_of(tmp_path):
    path = checkpoints.llama(tmp_path / "c", "ForCausalLM")
    checkpoint = Checkpoint.read(path)
    assert list(heads_of(checkpoint, ServingOptions())) == ["dense", "tokens"]
    with pytest.raises(CheckpointError, match="how it is to be asked is not known"):
        build_pipeline("c", str(path), checkpoint, ServingOptions(task="score"))


@pytest.mark.parametrize(
    ("kind", "name", "labels", "is_prompted"),
    [
        ("qwen3", "c", ("LABEL_0",), False),
        ("qwen3", "Qwen3-Reranker-8B-seq-cls", ("LABEL_0",), True),
        ("qwen3", "c", ("no", "yes"), True),
        ("qwen3", "c", ("good", "bad"), False),
        ("qwen2", "c", ("LABEL_0",), False),
        ("qwen2", "c", ("0", "1"), False),
        ("qwen2", "mxbai-rerank-base-v2-seq", ("LABEL_0",), True),
        ("qwen2", "mxbai-rerank-base-v2-seq", ("0", "1"), True),
        ("gemma", "bge-reranker-v2-gemma-seq-cls", ("LABEL_0",), True),
        ("gemma", "c", ("LABEL_0",), False),
        ("llama", "reranker", ("LABEL_0",), False),
    ],
)
def test_which_classifiers_are_conversions(tmp_path, kind, name, labels, is_prompted):
    # A folder of rerankers is no name of a model, but a hub's is.
    path = classifier(tmp_path / "rerankers" / name, families.FAMILIES[kind], len(labels), labels)
    assert (rerank_prompt_of(Checkpoint.read(path)) is not None) == is_prompted
    hub = tmp_path / f"models--org--{name}" / "snapshots" / "5f1c"
    hub.parent.mkdir(parents=True)
    path.rename(hub)
    assert (rerank_prompt_of(Checkpoint.read(hub)) is not None) == is_prompted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("make", "words", "labels"),
    [
        (decoders.qwen3_reranker, ("no", "yes"), ("LABEL_0",)),
        (decoders.mxbai_v2, ("0", "1"), ("LABEL_0",)),
        (decoders.mxbai_v2, ("0", "1"), ("0", "1")),
        (decoders.mxbai_v2, ("1", "0"), ("0", "1")),
    ],
)
def test_a_conversion_is_known_by_its_weights(tmp_path, make, words, labels, dtype):
    original = (
        make(tmp_path / "o", tie_word_embeddings=True) if make is decoders.mxbai_v2 else make(tmp_path / "o")
    )
    path = converted(tmp_path / "c", original, words, labels)
    file = path / "model.safetensors"
    tensors = {name: value.to(dtype) for name, value in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    found = rerank_prompt_of(Checkpoint.read(path))
    assert (found is not None) == (words != ("1", "0"))
    # A head that was trained for something else, of the same layout.
    tensors["score.weight"] = tensors["score.weight"].flip(1)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    assert rerank_prompt_of(Checkpoint.read(path)) is None


def test_a_person_says_what_the_prompt_is(tmp_path):
    plain = classifier(tmp_path / "c", checkpoints.qwen3)
    assert rerank_prompt_of(Checkpoint.read(plain, rerank_prompt="qwen3")) == QWEN3
    original = decoders.qwen3_reranker(tmp_path / "Qwen3-Reranker-0.6B")
    assert rerank_prompt_of(Checkpoint.read(original, rerank_prompt="mxbai")) == MXBAI
    bare = converted(tmp_path / "reranker", original, ("no", "yes"))
    assert rerank_prompt_of(Checkpoint.read(bare, rerank_prompt="none")) is None
    with pytest.raises(CheckpointError, match="no chat template that knows the roles"):
        rerank_prompt_of(Checkpoint.read(bare, rerank_prompt="chat-template"))
    with_pair_template(bare)
    named = rerank_prompt_of(Checkpoint.read(bare, rerank_prompt="chat-template"))
    assert named.name == "its chat template's"
    llama = checkpoints.llama(tmp_path / "llama", "ForCausalLM")
    checkpoint = Checkpoint.read(llama, rerank_prompt="qwen3")
    assert heads_of(checkpoint, ServingOptions()) == {"logits": "--rerank-prompt qwen3"}
    with pytest.raises(OptionError, match="rerank_prompt is 'x'; it takes one of none, qwen3"):
        ServingOptions(rerank_prompt="x")


def tokens(path, pairs, **parameters):
    return tokenize_for_logits(Checkpoint.read(path), pairs, parameters)


def test_caps_and_the_other_side(tmp_path):
    path = decoders.qwen3_reranker(tmp_path / "c", max_length=400)
    tokenizer = AutoTokenizer.from_pretrained(path)
    query, document = "the value of", "a class of it and the object in it"
    caps = [len(tokenizer(text)["input_ids"]) for text in ("the value", "a class of")]
    (whole,) = tokens(path, [(query, document)])
    (short,) = tokens(path, [("the value", "a class of")])
    (capped,) = tokens(path, [(query, document)], max_query_tokens=caps[0], max_document_tokens=caps[1])
    assert capped.ids.tolist() == short.ids.tolist()
    assert capped.is_truncated
    assert not whole.is_truncated
    # What the same number of tokens at the other end says.
    (end,) = tokens(path, [("value of", "x the end")], truncation="left")
    sides = {"max_document_tokens": len(tokenizer("x the end")["input_ids"])}
    (last,) = tokens(path, [("value of", "a class of x the end")], truncation="left", **sides)
    assert tokenizer.decode(last.ids).replace("  ", " ") == tokenizer.decode(end.ids)
    (left,) = tokens(path, [(query, "x " * 900 + "the end")], truncation="left")
    (right,) = tokens(path, [(query, "x " * 900 + "the end")])
    assert len(left.ids) <= 400 == len(right.ids)
    assert left.is_truncated
    assert "the end<|im_end|>" in tokenizer.decode(left.ids)
    assert "the end" not in tokenizer.decode(right.ids)
    (limited,) = tokens(path, [(query, document * 5)], max_tokens=len(whole.ids))
    assert (len(limited.ids), limited.is_truncated) == (len(whole.ids), True)


@pytest.mark.parametrize("truncation", ["right", "document", "left"])
@pytest.mark.parametrize("make", [decoders.qwen3_reranker, decoders.bge_gemma, decoders.mxbai_v2])
def test_documents_behind_a_long_query_still_differ(tmp_path, make, truncation):
    path = make(tmp_path / "c")
    pairs = [("why is it " * 400, "the panda"), ("why is it " * 400, "a class")]
    first, second = tokens(path, pairs, truncation=truncation)
    assert first.ids.tolist() != second.ids.tolist()
    assert max(len(first.ids), len(second.ids)) <= 512


@pytest.mark.parametrize("make", [decoders.qwen3_reranker, decoders.bge_gemma, decoders.mxbai_v2])
def test_an_instruction_and_small_limits_leave_room_for_both_texts(tmp_path, make):
    path = make(tmp_path / "c")
    query, other_query = "why is it " * 100, "zebra " * 100
    document, other_document = "panda " * 100, "class " * 100
    pairs = [(query, document), (query, other_document), (other_query, document)]
    instruction = "x y " * 20
    (bare,) = tokens(path, [("a", "b")], instruction=instruction)
    (told,) = tokens(path, [("a", "b")], instruction="z " * 20)
    assert bare.ids.tolist() != told.ids.tolist()
    tokenizer = AutoTokenizer.from_pretrained(path)
    for limit in (len(bare.ids) + 6, len(bare.ids) + 40):
        rows = tokens(path, pairs, instruction=instruction, max_tokens=limit)
        assert len({tuple(row.ids.tolist()) for row in rows}) == 3, "both texts are still there"
        for row in rows:
            assert len(row.ids) <= limit
            assert instruction.strip() in tokenizer.decode(row.ids)
            assert row.ids[-3:].tolist() == bare.ids[-3:].tolist(), "the prompt's end stays"


def test_a_limit_that_the_prompt_fills_is_told_at_once(tmp_path):
    path = decoders.qwen3_reranker(tmp_path / "c")
    checkpoint = Checkpoint.read(path, 100)
    with pytest.raises(
        OptionError, match=r"max_length is 100: the prompt around a pair takes \d+ tokens of 100"
    ):
        build_pipeline("c", str(path), checkpoint, ServingOptions(max_length=100))
    build_pipeline("c", str(path), Checkpoint.read(path, 300), ServingOptions(max_length=300))


def test_a_prompt_is_for_rerankers(tmp_path):
    path = decoders.qwen3_embedding(tmp_path / "c")
    checkpoint = Checkpoint.read(path, rerank_prompt="qwen3")
    with pytest.raises(
        OptionError, match=r"--rerank-prompt is for rerankers, and .* is served as dense, tokens"
    ):
        build_pipeline("c", str(path), checkpoint, ServingOptions(rerank_prompt="qwen3"))


@pytest.mark.parametrize("instruction", ["fill {document} now", "Answer {Yes} or {{No}}.", "{query}{", "{0}"])
@pytest.mark.parametrize("make", [decoders.qwen3_reranker, decoders.bge_gemma, decoders.mxbai_v2])
def test_braces_are_texts_like_others(tmp_path, make, instruction):
    path = make(tmp_path / "c")
    tokenizer = AutoTokenizer.from_pretrained(path)
    pairs = [("{document}", "{query} {instruction}"), ("{document}", "x " * 900)]
    for row in tokens(path, pairs, instruction=instruction):
        text = tokenizer.decode(row.ids)
        assert instruction in text
        assert "{document}" in text
        assert len(row.ids) <= 512
    assert "{query} {instruction}" in tokenizer.decode(tokens(path, pairs, instruction=instruction)[0].ids)


def test_a_long_query_leaves_room_for_a_document(tmp_path):
    path = decoders.bge_gemma(tmp_path / "bge-gemma")
    (row,) = tokens(path, [("x " * 900, "y " * 900)])
    text = AutoTokenizer.from_pretrained(path).decode(row.ids)
    assert len(row.ids) == 512
    assert text.count("x") > 50
    assert text.count("y") > 20


@pytest.mark.parametrize(
    ("parameters", "code", "text"),
    [
        (
            {"truncation": "error"},
            ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            "the pair has .* with the prompt around it",
        ),
        ({"max_tokens": 20}, ErrorCode.INVALID_INPUT, "the prompt around a pair takes"),
        ({"text_format": "ids"}, ErrorCode.INVALID_INPUT, "a pair takes texts"),
        (
            {"instruction": "a " * 900},
            ErrorCode.INVALID_INSTRUCTION,
            r"the prompt around a pair takes \d+ tokens",
        ),
        ({"instruction": "a " * 9000}, ErrorCode.INVALID_INSTRUCTION, "takes more than .* leaves no room"),
    ],
)
def test_what_is_refused(tmp_path, parameters, code, text):
    path = decoders.qwen3_reranker(tmp_path / "c")
    with pytest.raises(RequestError, match=text) as refused:
        tokens(path, [("a", "b"), ("the value", "x " * 900)], **parameters)
    assert refused.value.failure.code is code


def test_a_template_without_a_place_for_an_instruction(tmp_path):
    template = "{# 'query' 'document' #}{{ messages[0].content }} / {{ messages[1].content }}"
    path = with_pair_template(decoders.qwen3_reranker(tmp_path / "c"), template)
    with pytest.raises(RequestError, match="has no place for an instruction"):
        tokens(path, [("a", "b")], instruction="c")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content | upper }} {{ messages[1].content }}", "changes the texts"),
        ("{{ raise_exception('no') }}", "cannot be rendered with a query and a document: no"),
        ("{{", "cannot be rendered"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered"),
        ("{{ 1 + messages }}", "cannot be rendered"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path, template, message):
    path = with_pair_template(decoders.qwen3_reranker(tmp_path / "c"), "{# 'query' 'document' #}" + template)
    with pytest.raises(CheckpointError, match=message):
        rerank_prompt_of(Checkpoint.read(path))


@pytest.mark.parametrize(
    "template",
    ["query and document: {{ messages[0].content }}", "{# 'query', 'document' #}{{ messages[0].content }}"],
)
def test_a_conversation_s_template_is_not_one_of_pairs(tmp_path, template):
    path = with_pair_template(decoders.qwen3_reranker(tmp_path / "c"), template)
    assert rerank_prompt_of(Checkpoint.read(path)) == QWEN3


def test_a_template_that_takes_the_blanks_off(tmp_path):
    template = PAIR_CHAT.replace(
        "map(attribute='content') | first }}", "map(attribute='content') | first | trim }}"
    )
    path = with_pair_template(with_logit_score(decoders.qwen3_reranker(tmp_path / "c"), 300, 40), template)
    pairs = [("what is it ", "  the panda is a bear\n"), (" x", "y")]
    np.testing.assert_allclose(logits(path, pairs)[:, 0], cross_encoder(path, pairs), atol=TOLERANCE)
    kept = with_pair_template(path)
    assert np.abs(logits(kept, pairs)[:, 0] - cross_encoder(path, pairs)).max() < TOLERANCE
    (piece,) = rerank_prompt_of(Checkpoint.read(with_pair_template(path, template))).plain
    assert piece.strips == {Slot.QUERY, Slot.DOCUMENT}


def test_the_arguments_of_a_template(tmp_path):
    """zerank-2 has its generation prompt in sentence_bert_config.json."""
    template = PAIR_CHAT.replace(
        "<|im_start|>assistant\n<think>",
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}<think>",
    )
    path = with_pair_template(with_logit_score(decoders.qwen3_reranker(tmp_path / "c"), 300, 40), template)
    without = logits(path, PAIRS)[:, 0]
    config = json.loads((path / "sentence_bert_config.json").read_text())
    arguments = {"chat_template": {"add_generation_prompt": True}}
    write_json(path / "sentence_bert_config.json", {**config, "processing_kwargs": arguments})
    np.testing.assert_allclose(logits(path, PAIRS)[:, 0], cross_encoder(path, PAIRS), atol=TOLERANCE)
    assert np.abs(logits(path, PAIRS)[:, 0] - without).max() > 1e-3


def test_a_broken_logit_score_is_named(tmp_path):
    path = with_pair_template(with_logit_score(decoders.qwen3_reranker(tmp_path / "c"), 300, 40))
    write_json(path / "1_LogitScore" / "config.json", {"false_token_id": 3})
    with pytest.raises(CheckpointError, match="true_token_id and false_token_id are no token ids"):
        rerank_prompt_of(Checkpoint.read(path))


def test_a_template_that_wants_parts(tmp_path):
    template = (
        "{# 'query' 'document' #}query {{ messages[0].content[0].text }} "
        "document {{ messages[1].content[0].text }}"
    )
    path = with_pair_template(decoders.qwen3_reranker(tmp_path / "c"), template)
    (piece,) = rerank_prompt_of(Checkpoint.read(path)).plain
    assert piece == Piece.of("query {query} document {document}")
