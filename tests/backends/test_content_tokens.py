"""Token ids of items with images."""

import numpy as np
import pytest

from backends.chat_prompt import CHAT_PROMPTS, GME
from backends.checkpoint import Checkpoint
from backends.content_tokens import ContentTokenizer
from backends.errors import RequestError
from backends.families import family_of
from backends.tokenization import TextTokenizer
from backends.tokenizer_settings import TokenizerSettings
from tests.support import multimodal

CHAT = CHAT_PROMPTS[GME]
GRID = [1, 4, 4]
TEXT = "this is a value of the class"


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    checkpoint = Checkpoint.read(multimodal.qwen2_vl(tmp_path_factory.mktemp("c") / "c"))
    tokenizer = TextTokenizer(checkpoint, checkpoint.max_length, chat=CHAT)
    tokens = family_of(checkpoint).vision.tokens(checkpoint.config)
    return ContentTokenizer(tokenizer, tokens, CHAT)


def encode(contents, text, grids, **parameters):
    checkpoint = contents.tokenizer.checkpoint
    settings = TokenizerSettings.read(parameters, checkpoint, "right", chat=CHAT)
    (row,) = contents.encode([text.encode()], None if grids is None else np.array([grids]), settings)
    return row


def written(contents, row):
    return contents.tokenizer.tokenizer.decode(row.ids.tolist(), skip_special_tokens=False)


def test_the_prompt_is_gme_s_to_the_letter(contents):
    image = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    for text, grids, content in (
        (TEXT, None, TEXT),
        (TEXT, [GRID], image + TEXT),
        ("", [GRID], image),
        (TEXT, [GRID, GRID], image * 2 + TEXT),
        (TEXT, [[0, 0, 0]], TEXT),
        ("\n a", None, "\n a"),
    ):
        expected = multimodal.GME_PROMPT.format("You are a helpful assistant.", content)
        assert written(contents, encode(contents, text, grids)) == expected
        whole = contents.tokenizer.tokenizer.encode(expected, add_special_tokens=False)
        assert encode(contents, text, grids).ids.tolist() == whole.ids
    instructed = encode(contents, TEXT, [GRID], instruction=" Find it ", prompt="a ")
    assert written(contents, instructed) == multimodal.GME_PROMPT.format("Find it", f"{image}a {TEXT}")


@pytest.mark.parametrize("side", ["right", "left"])
def test_only_the_text_is_cut(contents, side):
    bare, whole = encode(contents, "", [GRID]), encode(contents, TEXT, [GRID])
    behind = len(contents.tokenizer.suffix)
    n_text = len(whole.ids) - len(bare.ids)
    own = whole.ids[len(bare.ids) - behind : len(whole.ids) - behind]
    for kept in range(n_text + 1):
        row = encode(contents, TEXT, [GRID], max_tokens=len(bare.ids) + kept, truncation=side)
        left = own[:kept] if side == "right" else own[n_text - kept :]
        expected = [*bare.ids[:-behind], *left, *bare.ids[-behind:]]
        assert row.ids.tolist() == expected
        assert row.is_truncated == (kept < n_text)
    with pytest.raises(RequestError, match=f"and max_tokens is {len(bare.ids) - 1}; send fewer or smaller"):
        encode(contents, TEXT, [GRID], max_tokens=len(bare.ids) - 1, truncation=side)
    with pytest.raises(RequestError, match=f"and max_tokens is {len(bare.ids) + 1}; shorten it"):
        encode(contents, TEXT, [GRID], max_tokens=len(bare.ids) + 1, truncation="error")
