"""Models of texts and images against transformers, in float32: alone, fused, mixed, in every cut."""

import numpy as np
import pytest
import torch

from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError, RequestError
from backends.families import FAMILIES
from backends.mrope import mrope_positions
from tests.support import families, multimodal
from tests.support.multimodal import ClipReference, QwenReference, picture
from tests.support.pipeline import embed_contents

TOLERANCE = 1e-5
WIDE, TALL, SMALL = picture(300, 30, 1), picture(60, 200, 2), picture(9, 9, 3)
TEXT = "this is a value (Äß 12)"
PROMPT = "the value of this class, which is in it: "
ITEMS = [
    (TEXT, []),
    ("", [WIDE]),
    (TEXT, [TALL]),
    ("\n the value", []),
    ("", [SMALL]),
    (PROMPT + TEXT, [WIDE]),
    ("x", []),
    (PROMPT, []),
]
APART = [(text, images if not text else []) for text, images in ITEMS]
QWENS = [name for name, family in FAMILIES.items() if family.vision is not None and name != "clip"]
QWEN3_PROMPT = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
FEW = {"min_image_tokens": 4, "max_image_tokens": 30}


def reference_of(name, path, **settings):
    """With the bounds of FEW."""
    unit = 32 if name == "qwen3_vl" else 28
    prompt = QWEN3_PROMPT if name == "qwen3_vl" else multimodal.GME_PROMPT
    return QwenReference(path, prompt, min_pixels=4 * unit**2, max_pixels=30 * unit**2, **settings)


DEFAULTS = {"qwen3_vl": "Represent the user's input."}


@pytest.mark.parametrize("name", QWENS)
def test_texts_and_images_in_one_prompt(tmp_path, name):
    path = families.FAMILIES[name](tmp_path / name)
    instruction = DEFAULTS.get(name, "You are a helpful assistant.")
    expected = reference_of(name, path)(ITEMS, instruction)
    got = embed_contents(path, ITEMS, **FEW)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    for budget in (1, 100, 300):
        np.testing.assert_allclose(embed_contents(path, ITEMS, None, budget, **FEW), expected, atol=TOLERANCE)
    alone = np.concatenate([embed_contents(path, [item], **FEW) for item in ITEMS])
    np.testing.assert_allclose(alone, expected, atol=TOLERANCE)
    instructed = embed_contents(path, ITEMS, {"instruction": "Find a picture."}, **FEW)
    np.testing.assert_allclose(instructed, reference_of(name, path)(ITEMS, "Find a picture."), atol=TOLERANCE)
    assert np.abs(instructed - expected).max() > 0.01, "negative control: the instruction shows"


@pytest.mark.parametrize("name", QWENS)
def test_negative_controls_of_images(tmp_path, name):
    """What a wrong position, another picture, or none at all does."""
    path = families.FAMILIES[name](tmp_path / name)
    item = [(TEXT, [TALL])]
    got = embed_contents(path, item, **FEW)
    plain = embed_contents(path, item, image_positions="plain", **FEW)
    assert np.abs(plain - got).max() > 1e-3
    for other in ([(TEXT, [WIDE])], [(TEXT, [])], [(TEXT, [TALL.rotate(180)])]):
        assert np.abs(embed_contents(path, other, **FEW) - got).max() > 1e-3


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_plain_positions(tmp_path, name):
    path = families.FAMILIES[name](tmp_path / name)
    expected = reference_of(name, path, is_plain=True)(ITEMS)
    got = embed_contents(path, ITEMS, image_positions="plain", **FEW)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)


def test_several_images_in_one_item(tmp_path):
    path = multimodal.qwen2_vl(tmp_path / "c")
    items = [(TEXT, [TALL, WIDE]), ("", [SMALL, SMALL, TALL]), (TEXT, [])]
    expected = reference_of("qwen2_vl", path)(items)
    np.testing.assert_allclose(embed_contents(path, items, **FEW), expected, atol=TOLERANCE)


def test_gme_as_published(tmp_path):
    path = multimodal.gme(tmp_path / "c")
    # Its own code resizes twice, to 256 tokens at least.
    items = [(TEXT, [TALL.resize((56, 196))]), ("", [SMALL.resize((56, 56))]), (TEXT, [])]
    expected = QwenReference(path, min_pixels=256 * 784, max_pixels=1280 * 784)(items)
    got = embed_contents(path, [(TEXT, [TALL]), ("", [SMALL]), (TEXT, [])])
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)


def test_an_image_of_extreme_proportions(tmp_path):
    path = multimodal.gme(tmp_path / "c")
    long = picture(1, 4000, 4)
    expected = QwenReference(path, min_pixels=256 * 784, max_pixels=1280 * 784)(
        [("", [long.resize((28, 4004))])]
    )
    np.testing.assert_allclose(embed_contents(path, [("", [long])]), expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    "settings", [{}, {"hidden_act": "gelu"}, {"eos_token_id": 2}], ids=["quick_gelu", "gelu", "wrong-eos"]
)
def test_clip(tmp_path, settings):
    path = multimodal.clip(tmp_path / "c", **settings)
    items = [*APART, ("<|endoftext|> this is behind the end", []), ("the value " * 60, [])]
    expected = ClipReference(path)(items)
    got = embed_contents(path, items)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    for budget in (1, 100):
        np.testing.assert_allclose(embed_contents(path, items, None, budget), expected, atol=TOLERANCE)
    alone = np.concatenate([embed_contents(path, [item]) for item in items])
    np.testing.assert_allclose(alone, expected, atol=TOLERANCE)
    for kind in ([item for item in items if item[1]], [item for item in items if item[0]]):
        np.testing.assert_allclose(embed_contents(path, kind), ClipReference(path)(kind), atol=TOLERANCE)


def test_negative_control_of_the_activation(tmp_path):
    items = [(TEXT, []), ("", [TALL])]
    got = [
        embed_contents(multimodal.clip(tmp_path / name, hidden_act=name), items)
        for name in ("quick_gelu", "gelu")
    ]
    assert np.abs(got[0] - got[1]).max(axis=1).min() > 1e-4


def test_clip_of_sentence_transformers_does_not_normalise(tmp_path):
    path = multimodal.clip_of_sentence_transformers(tmp_path / "c")
    expected = ClipReference(path / "0_CLIPModel")(APART, normalizes=False)
    np.testing.assert_allclose(embed_contents(path, APART), expected, atol=TOLERANCE)
    assert np.abs(np.linalg.norm(expected, axis=1) - 1).min() > 0.01


@pytest.mark.parametrize("merge", [1, 2])
def test_positions_in_three_axes(tmp_path, merge):
    """Against transformers' own loop, over many sequences."""
    path = multimodal.qwen2_vl(tmp_path / "c")
    model = QwenReference(path).model
    model.config.vision_config.spatial_merge_size = merge
    generator = np.random.default_rng(0)
    rows, grids, expected = [], [], []
    for _ in range(20):
        row, own = [], []
        for _ in range(generator.integers(0, 4)):
            row += [0] * generator.integers(1, 6)
            grid = (1, merge * generator.integers(1, 5), merge * generator.integers(1, 5))
            row += [1] * (grid[1] * grid[2] // merge**2)
            own.append(grid)
        row += [0] * generator.integers(1, 6)
        types = torch.tensor(row)[None]
        given = torch.tensor(own) if own else None
        expected.append(model.get_rope_index(types, types.int(), image_grid_thw=given)[0][:, 0].numpy())
        rows.append(row)
        grids += own
    got = mrope_positions(np.concatenate(rows) == 1, np.array(list(map(len, rows))), np.array(grids), merge)
    np.testing.assert_array_equal(got, np.concatenate(expected, axis=1))


def test_texts_that_spell_an_image_token_are_refused(tmp_path):
    path = multimodal.qwen2_vl(tmp_path / "c")
    for item in [("a <|image_pad|> b", []), ("<|video_pad|>", [SMALL])]:
        with pytest.raises(RequestError, match=r"the text holds <\|(image|video)_pad\|>, which stands for"):
            embed_contents(path, [(TEXT, [TALL]), item], **FEW)
    with pytest.raises(RequestError, match="the text holds"):
        embed_contents(path, [(TEXT, [TALL])], {"instruction": "<|image_pad|>"}, **FEW)


def test_items_that_cannot_be(tmp_path):
    clip, qwen = multimodal.clip(tmp_path / "clip"), multimodal.qwen2_vl(tmp_path / "qwen")
    with pytest.raises(RequestError, match="embeds a text or an image, and the item has more") as caught:
        embed_contents(clip, [("x", []), ("x", [SMALL])])
    assert caught.value.failure.item == 1
    with pytest.raises(RequestError, match="embeds a text or an image"):
        embed_contents(clip, [("", [SMALL, SMALL])])
    for path in (clip, qwen):
        with pytest.raises(RequestError, match="has neither a text nor an image"):
            embed_contents(path, [("", [SMALL]), ("", [])])


def test_images_are_never_cut(tmp_path):
    path = multimodal.qwen2_vl(tmp_path / "c")
    long = (TEXT * 40, [TALL])
    expected = reference_of("qwen2_vl", path)([long])
    np.testing.assert_allclose(embed_contents(path, [long], **FEW), expected, atol=TOLERANCE)
    for side in ("right", "left"):
        cut = embed_contents(path, [long], {"max_tokens": 90, "truncation": side}, **FEW)
        kept = embed_contents(path, [("", [TALL])], **FEW)
        assert np.abs(cut - expected).max() > 1e-3
        assert np.abs(cut - kept).max() > 1e-3, "some of the text stays"
    with pytest.raises(
        RequestError, match=r"images take \d+ tokens, \d+ with the prompt, and max_tokens is 40; send fewer"
    ):
        embed_contents(path, [long], {"max_tokens": 40}, **FEW)


def test_an_image_that_looks_at_its_neighbours_is_refused(tmp_path, monkeypatch):
    from backends.vision_language import VisionLanguage

    path = multimodal.qwen2_vl(tmp_path / "c")
    original = VisionLanguage.see

    def mixed(self, patches, grids):
        whole = np.array([[1, 2, len(patches) // 2]])
        return original(self, patches, whole)

    monkeypatch.setattr(VisionLanguage, "see", mixed)
    with pytest.raises(CheckpointError, match="sees an image differently beside others"):
        embed_contents(path, [("", [SMALL])], **FEW)


def test_what_a_checkpoint_says(tmp_path):
    clip = Checkpoint.read(multimodal.clip(tmp_path / "clip"))
    assert (clip.hidden_size, clip.max_length, clip.positions) == (20, 77, 77)
    gme = Checkpoint.read(multimodal.gme(tmp_path / "gme"))
    assert (gme.hidden_size, gme.max_length, gme.language_config["vocab_size"]) == (32, 4096, 380)
