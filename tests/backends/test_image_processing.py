"""The image processors against transformers' own, bit by bit."""

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, Qwen2VLImageProcessorPil

from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError, RequestError
from backends.families import family_of
from backends.image_file import PixelBudget, read_image
from backends.image_processing import (
    PixelBounds,
    fetched_size,
    gme_fetched_size,
    processor_config,
    value_table,
)
from backends.options import ServingOptions
from backends.vision import PixelTable
from tests.support import multimodal
from tests.support.multimodal import bomb, encoded, picture
from tests.support.vocabularies import write_json

SIZES = [(1, 1), (24, 24), (25, 31), (31, 25), (640, 480), (7, 300), (300, 7), (97, 1023)]


def processor_of(path, **options):
    checkpoint = Checkpoint.read(path)
    vision = family_of(checkpoint).vision
    return vision.processor(checkpoint, ServingOptions(**options)), checkpoint


def values_of(checkpoint, patches):
    """What the encoder makes of bytes: [p, 3, s]."""
    table = PixelTable(value_table(processor_config(checkpoint)), torch.device("cpu"))
    return table(torch.from_numpy(patches)).numpy()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return multimodal.clip(tmp_path_factory.mktemp("c") / "clip")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return multimodal.qwen2_vl(tmp_path_factory.mktemp("c") / "qwen")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 24}},
        {"size": {"height": 24, "width": 24}, "do_center_crop": False},
        {"size": 20},
        {"resample": 2, "do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 0.01, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]},
    ],
)
def test_clip_s_pixels(clip, tmp_path, size, changes):
    config = {**json.loads((clip / "preprocessor_config.json").read_text()), **changes}
    path = multimodal.clip(tmp_path / "c")
    write_json(path / "preprocessor_config.json", config)
    image = picture(*size)
    expected = CLIPImageProcessorPil(**config)(image)["pixel_values"][0]
    processor, checkpoint = processor_of(path)
    patches, grid = processor(image)
    assert grid == (1, 3, 3)
    squares = values_of(checkpoint, patches).reshape(3, 3, 3, 8, 8)
    got = squares.transpose(2, 0, 3, 1, 4).reshape(3, 24, 24)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("size", [size for size in SIZES if max(size) < 200 * min(size)])
@pytest.mark.parametrize("bounds", [{}, {"min_image_tokens": 4, "max_image_tokens": 9}])
def test_qwen_s_pixels(qwen, size, bounds):
    config = json.loads((qwen / "preprocessor_config.json").read_text())
    for name, pixels in (("min_image_tokens", "min_pixels"), ("max_image_tokens", "max_pixels")):
        if name in bounds:
            config[pixels] = bounds[name] * 28 * 28
    image = picture(*size)
    expected = Qwen2VLImageProcessorPil(**config)(image)
    processor, checkpoint = processor_of(qwen, **bounds)
    patches, grid = processor(image)
    assert list(grid) == expected["image_grid_thw"][0].tolist()
    values = values_of(checkpoint, patches)
    frames = np.repeat(values[:, :, None], 2, axis=2).reshape(len(values), -1)
    np.testing.assert_array_equal(frames, expected["pixel_values"])


def test_negative_control_bilinear_and_a_missing_resize_show(qwen):
    image = picture(97, 131)
    config = json.loads((qwen / "preprocessor_config.json").read_text())
    patches, _ = processor_of(qwen)[0](image)
    values = values_of(Checkpoint.read(qwen), patches)
    other = Qwen2VLImageProcessorPil(**{**config, "resample": 2})(image)["pixel_values"]
    assert np.abs(other.reshape(len(values), 3, 2, -1)[:, :, 0] - values).max() > 0.1
    gme, _ = processor_of(qwen, chat_template="gme-qwen2-vl")
    assert gme(image)[1] != processor_of(qwen)[0](image)[1], "GME takes at least 256 tokens"


def test_gme_resizes_twice(tmp_path):
    path = multimodal.gme(tmp_path / "gme")
    config = {**json.loads((path / "preprocessor_config.json").read_text())}
    config.update(min_pixels=256 * 28 * 28, max_pixels=1280 * 28 * 28)
    image = picture(130, 97)
    # As its own code: qwen-vl-utils' resize (both sides to the next multiple of 28), then the processor.
    expected = Qwen2VLImageProcessorPil(**config)(image.resize((140, 84)))
    patches, grid = processor_of(path)[0](image)
    assert list(grid) == expected["image_grid_thw"][0].tolist()
    values = values_of(Checkpoint.read(path), patches)
    np.testing.assert_array_equal(values, expected["pixel_values"].reshape(len(values), 3, 2, -1)[:, :, 0])
    once = Qwen2VLImageProcessorPil(**config)(image)
    assert once["pixel_values"].shape != expected["pixel_values"].shape or (
        np.abs(once["pixel_values"] - expected["pixel_values"]).max() > 0.1
    )


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 1), (56, 56)),
        ((1, 4000), (28, 4004)),
        ((9000, 1), (5600, 28)),
        ((140, 84), (140, 84)),
        ((20000, 10000), (5068, 2520)),
    ],
)
def test_gme_s_first_resize(size, expected):
    assert gme_fetched_size(*size) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        # As qwen-vl-utils has them: thin sides are a unit at least, even where the bounds do not ask for it.
        ((300, 10), (288, 32)),
        ((9, 9), (64, 64)),
        ((640, 480), (640, 480)),
        ((3000, 1500), (1920, 960)),
    ],
)
def test_qwen3_s_resize(tmp_path, size, expected):
    assert fetched_size(*size, 32, PixelBounds(4 * 1024, 1800 * 1024)) == expected
    processor, checkpoint = processor_of(multimodal.qwen3_vl(tmp_path / "c"))
    image = picture(*size)
    patches, grid = processor(image)
    assert grid == (1, expected[1] // 16, expected[0] // 16)
    config = json.loads((tmp_path / "c" / "preprocessor_config.json").read_text())
    wanted = Qwen2VLImageProcessorPil(**config, do_resize=False)(image.resize(expected))["pixel_values"]
    values = values_of(checkpoint, patches)
    np.testing.assert_array_equal(values, wanted.reshape(len(values), 3, 2, -1)[:, :, 0])


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1), (30000, 2)])
def test_extreme_pictures_stay_small(clip, tmp_path, size):
    image = picture(*size)
    processor, checkpoint = processor_of(clip)
    patches, _ = processor(image)
    assert patches.shape == (9, 192)
    config = json.loads((clip / "preprocessor_config.json").read_text())
    expected = CLIPImageProcessorPil(**config)(image)["pixel_values"][0]
    squares = values_of(checkpoint, patches).reshape(3, 3, 3, 8, 8)
    got = squares.transpose(2, 0, 3, 1, 4).reshape(3, 24, 24)
    # One step of 255, normalised.
    np.testing.assert_allclose(got, expected, atol=1.01 / 255 / 0.26)
    gme, _ = processor_of(multimodal.gme(tmp_path / "gme"))
    assert 256 * 4 <= len(gme(image)[0]) <= 1280 * 4


def test_an_extreme_picture_without_gme_s_first_resize_is_refused(qwen):
    with pytest.raises(RequestError, match="has 1 x 4000 pixels; one side may be 200 times as long"):
        processor_of(qwen)[0](picture(1, 4000))


def test_a_processor_that_does_not_fit_the_model_is_refused(clip, tmp_path):
    path = multimodal.clip(tmp_path / "c")
    config = json.loads((path / "preprocessor_config.json").read_text())
    write_json(path / "preprocessor_config.json", {**config, "crop_size": 32})
    with pytest.raises(CheckpointError, match=r"makes images of \(32, 32\), and the model takes 24 x 24"):
        processor_of(path)
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
        processor_of(path)


def test_the_processor_s_configuration_inside_processor_config(qwen, tmp_path):
    path = multimodal.qwen2_vl(tmp_path / "q")
    own = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").unlink()
    write_json(path / "processor_config.json", {"image_processor": {**own, "max_pixels": 784 * 7}})
    assert processor_of(path)[0].max_image_tokens == 7


def pixels(image):
    with read_image(image) as picture:
        return np.asarray(picture)


def test_files_of_many_kinds():
    image = picture(20, 10)
    for kind in ("PNG", "BMP", "TIFF"):
        np.testing.assert_array_equal(pixels(encoded(image, kind)), np.asarray(image))
    for kind in ("JPEG", "WEBP", "AVIF", "MPO"):
        assert pixels(encoded(image, kind)).shape == (10, 20, 3), kind
    np.testing.assert_array_equal(pixels(encoded(image, "WEBP", lossless=True)), np.asarray(image))


def test_grey_palette_and_black_and_white():
    grey = picture(8, 8).convert("L")
    np.testing.assert_array_equal(pixels(encoded(grey))[..., 1], np.asarray(grey))
    palette = picture(8, 8).convert("P")
    np.testing.assert_array_equal(pixels(encoded(palette)), np.asarray(palette.convert("RGB")))
    assert set(np.unique(pixels(encoded(grey.convert("1"))))) <= {0, 255}


def test_transparency_lies_on_white():
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 255))
    assert pixels(encoded(image)).tolist() == [[[255, 255, 255], [200, 0, 0]]]
    half = Image.new("LA", (1, 1), (0, 128))
    assert pixels(encoded(half)).tolist() == [[[127, 127, 127]]]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    assert pixels(encoded(palette, transparency=0)).tolist() == [[[255, 255, 255]]]


def test_sixteen_bits_keep_their_brightness():
    values = np.array([[0, 0x1234, 0x80FF, 0xFFFF]], np.uint16)
    for kind in ("PNG", "TIFF"):
        got = pixels(encoded(Image.fromarray(values), kind))
        assert got[..., 0].tolist() == [[0, 0x12, 0x80, 0xFF]], kind


def test_thirty_two_bits_that_hold_eight():
    values = np.array([[0, 7, 255]], np.int32)
    assert pixels(encoded(Image.fromarray(values), "TIFF"))[..., 0].tolist() == [[0, 7, 255]]
    assert pixels(encoded(Image.fromarray(values * 257), "TIFF"))[..., 0].tolist() == [[0, 7, 255]]


def test_transparency_of_large_pictures_is_that_of_transformers():
    """Which does it in one piece."""
    from transformers.image_transforms import convert_to_rgb

    clear = picture(3000, 1200).convert("RGBA")
    clear.putalpha(picture(3000, 1200, 7).convert("L"))
    np.testing.assert_array_equal(pixels(encoded(clear)), convert_to_rgb(clear, return_numpy=True))


def test_pictures_that_fit_are_read_at_once():
    budget, meeting = PixelBudget(100), threading.Barrier(2)

    def work(pixels):
        with budget.take(pixels):
            meeting.wait(10)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, [40, 60]))


@pytest.mark.parametrize(("held", "waiting"), [(60, 41), (1, 500), (500, 1)])
def test_a_picture_over_the_budget_waits_and_others_pass_it(held, waiting):
    budget, order = PixelBudget(100), []

    def work(pixels, name):
        with budget.take(pixels):
            order.append(name)

    with ThreadPoolExecutor(2) as pool:
        with budget.take(held):
            late = pool.submit(work, waiting, "late")
            if held < 100:
                pool.submit(work, 40, "small").result(10)
            order.append("released")
        late.result(10)
    assert order == [*(["small"] if held < 100 else []), "released", "late"]


def test_cmyk_and_exif():
    image = picture(16, 8)
    cmyk = encoded(image.convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert np.abs(pixels(cmyk).astype(int) - np.asarray(image)).mean() < 10
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees
    turned = pixels(encoded(image, "PNG", exif=exif))
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(image), -1))


def test_of_an_animation_the_first_picture():
    frames = [picture(6, 6, seed).convert("P", palette=Image.Palette.ADAPTIVE) for seed in (1, 2)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels(data), np.asarray(frames[0].convert("RGB")))
    pictures = [picture(6, 6, seed) for seed in (1, 2)]
    data = encoded(pictures[0], "WEBP", save_all=True, append_images=pictures[1:], lossless=True)
    np.testing.assert_array_equal(pixels(data), np.asarray(pictures[0]))


def test_what_cannot_be_used_is_refused():
    whole = encoded(picture(64, 64), "PNG")
    cases = [
        (bomb(40000), "it has 40000 x 40000 pixels; at most 50000000 are taken, send it smaller"),
        (whole[: len(whole) // 2], "it cannot be read: "),
        (encoded(picture(64, 64), "JPEG")[:-300], "it cannot be read: image file is truncated"),
        (b"GIF89a", "its 6 bytes are no image that is read here"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "are no image that is read here"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "are no image that is read here"),
        (encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "fractions whose range is not told"),
    ]
    for data, message in cases:
        with pytest.raises(RequestError, match="the image cannot be used") as caught:
            pixels(data)
        assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_harmed_files_are_read_or_refused(kind):
    """Bytes changed here and there: never anything but a picture or a refusal."""
    whole = encoded(picture(40, 30), kind)
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(60):
        data = bytearray(whole)
        for place in generator.integers(0, len(data), 4):
            data[place] = generator.integers(0, 256)
        with contextlib.suppress(RequestError):
            outcomes.add(pixels(bytes(data)).shape[2])
    assert outcomes <= {3}
