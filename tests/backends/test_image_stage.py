"""The stages of models of texts and images, with a stand-in for the server's module."""

import numpy as np
import pytest

from backends.stages.encoder import EncoderStage
from backends.stages.image import ImageStage
from backends.stages.tokenizer import TokenizerStage
from tests.backends.test_stages import start
from tests.support import checkpoints, multimodal
from tests.support.fake_pb_utils import Request, TritonModelException, answers
from tests.support.multimodal import encoded, picture

SMALL, LARGE = encoded(picture(20, 20)), encoded(picture(90, 200), "JPEG")
SEEN = ("patches", "image_grid")


def images(*rows):
    return Request({"image": np.array(rows, object)}, wanted=SEEN)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return multimodal.clip(tmp_path_factory.mktemp("c") / "clip")


@pytest.fixture(scope="module")
def gme(tmp_path_factory):
    return multimodal.gme(tmp_path_factory.mktemp("c") / "gme")


def test_patches_come_end_to_end_with_a_grid_for_each_image(gme):
    stage = start(ImageStage(), gme, min_image_tokens="4", max_image_tokens="60")
    one, several = stage.execute([images([SMALL]), images([LARGE, b""], [b"", b""], [SMALL, LARGE])])
    grids = several.value("image_grid")
    assert grids.shape == (3, 2, 3)
    assert grids[0, 1].tolist() == grids[1, 0].tolist() == [0, 0, 0]
    counts = grids.prod(-1)
    assert several.value("patches").shape == (1, counts.sum(), 3 * 14 * 14)
    assert several.value("patches").dtype == np.uint8
    assert counts[0, 0] != counts[2, 0], "nothing is padded to the largest"
    np.testing.assert_array_equal(
        one.value("patches")[0], several.value("patches")[0][counts[0, 0] :][: counts[2, 0]]
    )


def test_one_bad_image_is_one_error(clip):
    stage = start(ImageStage(), clip)
    fine, bad, second = stage.execute(
        [images([SMALL]), images([SMALL], [b"no image"]), images([SMALL, SMALL], [SMALL, b"x"])]
    )
    assert fine.error is None
    assert bad.error.message == (
        "invalid_image at item 1: the image cannot be used: its 8 bytes are no image that is read here "
        "(JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF)"
    )
    assert second.error.message.startswith("invalid_image at item 1: image 2 of this item: the image cannot")


def test_a_model_of_texts_has_no_image_stage(tmp_path):
    with pytest.raises(TritonModelException, match="is a model of texts only"):
        start(ImageStage(), checkpoints.bert(tmp_path / "c"))


def text(*texts, grids=None, **parameters):
    inputs = {"text": np.array([[t.encode()] for t in texts], object)}
    if grids is not None:
        inputs["image_grid"] = np.array(grids, np.int32)
    wanted = ("input_ids", "length", "n_tokens", "truncated", "grid", "patches")
    return Request(inputs, parameters, wanted)


def test_the_tokenizer_gives_empty_patches_without_images(gme):
    (answer,) = start(TokenizerStage(), gme).execute([text("a", "b")])
    assert answer.value("patches").shape == (1, 0, 588)
    assert answer.value("grid").shape == (1, 0, 3)


def test_the_tokenizer_makes_room_for_images(gme):
    stage = start(TokenizerStage(), gme)
    answer, plain = stage.execute(
        [
            text("a", "", "a", grids=[[[1, 4, 6], [0, 0, 0]], [[1, 2, 2], [1, 4, 4]], [[0, 0, 0]] * 2]),
            text("a"),
        ]
    )
    assert answer.value("grid").tolist() == [[[1, 4, 6], [1, 2, 2], [1, 4, 4]]]
    bare = plain.value("n_tokens")[0, 0]
    assert answer.value("n_tokens").ravel().tolist() == [bare + 6 + 2, bare - 1 + 1 + 4 + 4, bare]


def test_an_image_of_clip_is_an_item(clip):
    stage = start(TokenizerStage(), clip)
    answer, both = stage.execute(
        [text("a", "", grids=[[[0, 0, 0]], [[1, 3, 3]]]), text("a", grids=[[[1, 3, 3]]])]
    )
    assert answer.value("length").tolist() == [[3, 1]]
    assert answer.value("n_tokens").ravel().tolist() == [3, 10]
    assert both.error.message.startswith("invalid_input at item 0: this model embeds a text or an image")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (text("", grids=[[[0, 0, 0]]]), "invalid_input at item 0: the item has neither a text nor an image"),
        (text("a", "b", grids=[[[1, 2, 2]]]), "invalid_input: there are 2 items in text and 1 in image"),
        (text("a", grids=[[[1, 2, 2]]], text_format="ids"), "takes a text, not token ids"),
        (
            text("a", instruction="b", role="document"),
            "invalid_instruction: instruction and input_type document",
        ),
        (text("a", instruction="b", prompt_name="query"), "invalid_instruction: instruction and prompt_name"),
        (
            text("a", grids=[[[1, 140, 140]]]),
            "images_too_long at item 0: the item's images take 4902 tokens, 4944 with the prompt, and this "
            "model",
        ),
    ],
)
def test_refusals_of_the_tokenizer(gme, bad, message):
    good, refused = start(TokenizerStage(), gme).execute([text("fine"), bad])
    assert good.error is None
    assert message in refused.error.message


def test_the_encoder_takes_texts_and_images_of_one_batch(gme):
    """Requests with and without images, each as it comes out alone."""
    tokenizer = start(TokenizerStage(), gme, dtype="float32")
    encoder = start(EncoderStage(), gme, heads="dense", dtype="float32")
    seen = start(ImageStage(), gme, min_image_tokens="4", max_image_tokens="60").execute(
        [images([SMALL]), images([LARGE])]
    )
    asked = [
        text("a"),
        text("", grids=seen[0].value("image_grid")),
        text("b", "c"),
        text("x", grids=seen[1].value("image_grid")),
    ]
    patches = [None, seen[0].value("patches"), None, seen[1].value("patches")]
    requests = []
    for answer, own in zip(tokenizer.execute(asked), patches, strict=True):
        inputs = {name: answer.value(name) for name in ("input_ids", "length", "grid")}
        inputs["patches"] = answer.value("patches") if own is None else own
        requests.append(Request(inputs))
    together = answers(encoder, requests)
    alone = [answers(encoder, [request])[0] for request in requests]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.value("last_hidden"), other.value("last_hidden"), atol=1e-5)
    assert together[2].value("last_hidden").shape == (1, 2, 32)
