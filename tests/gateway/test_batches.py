import dataclasses

import numpy as np
import pytest

from backends.contract import DENSE, IMAGE, N_TOKENS, TEXT, TOKEN_EMBEDDINGS
from gateway import batches
from gateway.batches import Content, Part, cut, merge, size, tensors
from tests.support.fake_inference import MULTIMODAL, PIPELINE


def places(items, pipeline=PIPELINE):
    return [part.places for part in cut(items, pipeline)]


@pytest.mark.parametrize("count", [1, 4, 5, 11])
def test_cuts_are_within_the_batch_size_and_complete(count):
    items = [b"x" * (i * 7 % 5) for i in range(count)]
    parts = places(items)
    assert sorted(i for part in parts for i in part) == list(range(count))
    assert all(len(part) <= 4 for part in parts)
    if count > 4:
        sizes = [len(items[i]) for part in parts for i in part]
        assert sizes == sorted(sizes), "items of about one size share a server request"


def test_cuts_are_within_the_token_budget():
    pipeline = dataclasses.replace(PIPELINE, max_batch_tokens=20)
    items = [b"x" * n for n in (4, 4, 4, 4, 1000, 4)]
    # 4 tokens each by their bytes, and 16 for the one over the model's limit.
    assert places(items, pipeline) == [[0, 1, 2, 3], [5, 4]]
    assert places([b"x" * 1000] * 3, pipeline) == [[0], [1], [2]]
    assert places([(b"x" * 500, b"x" * 500)] * 2, pipeline) == [[0], [1]]


def test_items_with_images_have_server_requests_of_their_own():
    items = [b"a", Content(b"b", (b"1",)), b"c", Content(b"", (b"2", b"3"))]
    # A text of a byte has two tokens at most, and an image of this model four.
    both = [
        Part([0, 2], has_images=False, tokens=4, size=2),
        Part([1, 3], has_images=True, tokens=16, size=4),
    ]
    assert cut(items, MULTIMODAL) == both
    assert cut(items[1:2], MULTIMODAL) == [Part([0], has_images=True, tokens=6, size=2)]
    assert cut(items[:1], MULTIMODAL) == [Part([0], has_images=False, tokens=2, size=1)]


def test_an_image_counts_as_the_tokens_that_it_may_have():
    pipeline = dataclasses.replace(MULTIMODAL, max_batch_tokens=120, max_image_tokens=10)
    # Of a quarter of the budget. 12 tokens each, and of an image's 10 none are within the limit of a text.
    assert places([Content(b"", (b"1",))] * 3, pipeline) == [[0, 1], [2]]
    assert places([Content(b"", (b"1",) * 3)] * 2, pipeline) == [[0], [1]]


def test_items_with_as_many_images_share_a_server_request():
    one, two = Content(b"x", (b"1",)), Content(b"", (b"1", b"2"))
    assert places([two, one, two, one, two, one, two, one], MULTIMODAL) == [[1, 3, 5, 7], [0, 2, 4, 6]]


def test_cuts_are_within_the_bytes_of_images(monkeypatch):
    monkeypatch.setattr(batches, "_MAX_IMAGE_BYTES", 100)
    items = [Content(b"", (b"x" * n,)) for n in (60, 40, 300, 30)]
    assert places(items, MULTIMODAL) == [[3, 1], [0], [2]], "one item goes whatever it has"
    assert places([Content(b"x" * 1000, (b"x" * 50,))] * 2, MULTIMODAL) == [[0, 1]], "texts do not count"


def test_the_size_of_an_item():
    assert [size(item) for item in (b"abc", (b"a", b"bc"), Content(b"a", (b"bc", b"d")))] == [3, 3, 4]


def test_tensors_of_texts_pairs_and_images():
    assert tensors([b"a", b"bc"], None)[TEXT].tolist() == [[b"a"], [b"bc"]]
    assert tensors([(b"a", b"b")], None)[TEXT].tolist() == [[b"a", b"b"]]
    mixed = [Content(b"a", (b"1",)), Content(b"", (b"2", b"3"))]
    made = tensors(mixed, None)
    assert {name: array.tolist() for name, array in made.items()} == {
        TEXT: [[b"a"], [b""]],
        IMAGE: [[b"1", b""], [b"2", b"3"]],
    }
    assert {array.dtype for array in made.values()} == {np.dtype(object)}
    assert set(tensors(mixed, "image")) == {IMAGE}
    assert set(tensors([b"a"], "tokenizer")) == {TEXT}


def test_answers_of_both_kinds_come_back_in_order():
    parts = [Part([0, 2], False, tokens=4, size=2), Part([1, 3], True, tokens=16, size=4)]
    answers = [
        {
            DENSE: np.array([[start], [start + 2.0]]),
            TOKEN_EMBEDDINGS: np.array([[[start], [start + 2], [start + 2]]]),
            N_TOKENS: np.array([[1], [2]]),
        }
        for start in (0.0, 1.0)
    ]
    assert merge(DENSE, answers, parts, 4).tolist() == [[0], [1], [2], [3]]
    rows = merge(TOKEN_EMBEDDINGS, answers, parts, 4)
    assert [row[:, 0].tolist() for row in rows] == [[0], [1], [2, 2], [3, 3]]
