"""What the tokenizer does to queries and documents, and what is read of the layouts."""

import numpy as np
import pytest

from backends.checkpoint import Checkpoint
from backends.errors import RequestError
from backends.late_interaction import PUNCTUATION, late_interaction_of
from backends.tokenization import TextTokenizer
from backends.tokenizer_settings import TokenizerSettings
from tests.support.checkpoints import bert, bge_m3, pylate, sentence_transformer, stanford, write_json


def tokenizer_of(path):
    checkpoint = Checkpoint.read(path)
    return TextTokenizer(checkpoint, checkpoint.max_length, late_interaction_of(checkpoint))


def encode(tokenizer, *texts, **parameters):
    settings = TokenizerSettings.read(parameters, tokenizer.checkpoint, "error", tokenizer.late)
    return tokenizer.encode([text.encode() for text in texts], settings)


def words(tokenizer, row):
    return [tokenizer.tokenizer.id_to_token(int(i)) for i in row.ids]


def test_a_query_is_marked_and_expanded(tmp_path):
    tokenizer = tokenizer_of(stanford(tmp_path / "c"))
    (row,) = encode(tokenizer, "value", role="query")
    assert words(tokenizer, row) == ["[CLS]", "[unused0]", "value", "[SEP]", *["[MASK]"] * 12]
    assert row.n_blind == 12
    (document,) = encode(tokenizer, "value")
    assert words(tokenizer, document) == ["[CLS]", "[unused1]", "value", "[SEP]"]
    assert document.n_blind == 0


def test_a_full_query_has_no_expansion(tmp_path):
    tokenizer = tokenizer_of(pylate(tmp_path / "c"))
    (row,) = encode(tokenizer, "a " * 30, role="query", truncation="right")
    assert (len(row.ids), row.n_blind, row.is_truncated) == (16, 0, True)
    with pytest.raises(RequestError, match="has 33 tokens, and this model takes 16 tokens of a query"):
        encode(tokenizer, "a " * 30, role="query")
    with pytest.raises(RequestError, match="has 63 tokens, and this model takes 40 tokens of a document"):
        encode(tokenizer, "a " * 60)


def test_the_prompt_of_a_request_wins_over_the_mark(tmp_path):
    tokenizer = tokenizer_of(pylate(tmp_path / "c", do_query_expansion=False))
    (row,) = encode(tokenizer, "value", role="query", prompt="the ")
    assert words(tokenizer, row) == ["[CLS]", "the", "value", "[SEP]"]


def test_token_ids_are_marked_and_expanded_too(tmp_path):
    tokenizer = tokenizer_of(pylate(tmp_path / "c"))
    (text,) = encode(tokenizer, "value", role="query")
    ids = np.array(tokenizer.tokenizer.encode("value", add_special_tokens=False).ids, "<i4").tobytes()
    settings = TokenizerSettings.read(
        {"role": "query", "text_format": "ids"}, tokenizer.checkpoint, "error", tokenizer.late
    )
    (row,) = tokenizer.encode([ids], settings)
    assert row.ids.tolist() == text.ids.tolist()


def test_roles_of_dense_models_are_their_prompts(tmp_path):
    prompts = {"prompts": {"query": "query ", "passage": "value "}, "default_prompt_name": "passage"}
    path = sentence_transformer(tmp_path / "c", {"pooling_mode": "mean"}, sentence=prompts)
    tokenizer = tokenizer_of(path)
    assert words(tokenizer, encode(tokenizer, "x", role="query")[0])[1] == "query"
    assert words(tokenizer, encode(tokenizer, "x", role="document")[0])[1] == "value"
    assert words(tokenizer, encode(tokenizer, "x")[0])[1] == "value"
    assert words(tokenizer, encode(tokenizer, "x", role="document", prompt_name="query")[0])[1] == "query"


def test_what_is_read_of_each_layout(tmp_path):
    assert late_interaction_of(Checkpoint.read(bert(tmp_path / "bert"))) is None
    m3 = late_interaction_of(Checkpoint.read(bge_m3(tmp_path / "m3")))
    assert (m3.layout, m3.drops_first, m3.has_roles, m3.skip_words) == ("bge_m3", True, False, ())
    old = late_interaction_of(Checkpoint.read(stanford(tmp_path / "s")))
    assert (old.lengths, old.expansion.length, old.skip_words) == ({"document": 40}, 16, PUNCTUATION)
    assert old.has_blind_tokens


def test_stanford_s_defaults_without_its_metadata(tmp_path):
    path = stanford(tmp_path / "c")
    (path / "artifact.metadata").unlink()
    late = late_interaction_of(Checkpoint.read(path))
    assert late.prompts == {"query": "[unused0] ", "document": "[unused1] "}
    assert (late.lengths, late.expansion.length, late.expansion.attends) == ({}, 32, False)
    write_json(path / "artifact.metadata", {"mask_punctuation": False, "attend_to_mask_tokens": True})
    late = late_interaction_of(Checkpoint.read(path))
    assert late.skip_words == ()
    assert not late.has_blind_tokens


def test_a_prompt_by_its_name_is_the_mark_too(tmp_path):
    for settings in ({}, {"prompts": {"query": "ask ", "document": ""}}):
        path = pylate(tmp_path / f"c{len(settings)}", do_query_expansion=False, **settings)
        tokenizer = tokenizer_of(path)
        (named,) = encode(tokenizer, "value", role="query", prompt_name="query")
        (plain,) = encode(tokenizer, "value", role="query")
        assert named.ids.tolist() == plain.ids.tolist()


def test_an_empty_prompt_is_a_prompt(tmp_path):
    prompts = {"prompts": {"query": "query ", "document": ""}, "default_prompt_name": "query"}
    path = sentence_transformer(tmp_path / "c", {"pooling_mode": "mean"}, sentence=prompts)
    tokenizer = tokenizer_of(path)
    for asked in ({"role": "document"}, {"prompt_name": "document"}, {"prompt": ""}):
        assert words(tokenizer, encode(tokenizer, "x", **asked)[0]) == ["[CLS]", "x", "[SEP]"]
    assert words(tokenizer, encode(tokenizer, "x")[0])[1] == "query"


def test_ids_that_hold_the_mark_get_no_second_one(tmp_path):
    tokenizer = tokenizer_of(pylate(tmp_path / "c"))
    (row,) = encode(tokenizer, "value")
    settings = TokenizerSettings.read({"text_format": "ids"}, tokenizer.checkpoint, "error", tokenizer.late)
    (again,) = tokenizer.encode([row.ids.astype("<i4").tobytes()], settings)
    assert again.ids.tolist() == row.ids.tolist()


def test_descriptions_and_decoding(tmp_path):
    tokenizer = tokenizer_of(sentence_transformer(tmp_path / "c", {"pooling_mode": "mean"}))
    plain = TokenizerSettings()
    (row,) = tokenizer.describe([b"the Value!"], plain, add_special_tokens=True)
    assert row.texts == ["[CLS]", "the", "Value", "!", "[SEP]"]
    assert row.spans == [(0, 0), (0, 3), (4, 9), (9, 10), (0, 0)]
    assert row.is_special == [True, False, False, False, True]
    items = [np.array(row.ids, "<i4").tobytes()]
    assert tokenizer.decode(items, skip_special_tokens=True) == ["the value!"]
    assert tokenizer.decode(items, skip_special_tokens=False) == ["[CLS] the value! [SEP]"]
    (bare,) = tokenizer.describe([b"the"], plain, add_special_tokens=False)
    assert bare.texts == ["the"]
    (pieces,) = tokenizer.describe(items, TokenizerSettings(has_ids=True), add_special_tokens=True)
    assert pieces.texts == ["[CLS]", "the", "value", "!", "[SEP]"]
    with pytest.raises(RequestError, match=r"has 20000 characters; at most 12288 are looked at"):
        tokenizer.describe([b"a" * 20000], plain, add_special_tokens=True)
    # A model may have more ids than its tokenizer knows tokens.
    tokenizer.checkpoint.config["vocab_size"] = 200
    unknown = [np.array([199], "<i4").tobytes()]
    (row,) = tokenizer.describe(unknown, TokenizerSettings(has_ids=True), add_special_tokens=True)
    assert row.texts == ["199"]
