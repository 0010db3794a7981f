"""Pixels, PNG files with their provenance, grids, and pictures as input."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypersd_export.errors import DestinationError, OptionError
from hypersd_export.runtime.images import grid, png_bytes, read_image, save_png, to_image, to_sample, to_uint8


def test_rounding_is_diffusers() -> None:
    values = np.array([-3.0, -1.0, -0.996, -0.004, 0.0, 0.004, 0.5, 0.999, 1.0, 7.0], dtype=np.float32)
    sample = np.broadcast_to(values, (1, 3, 1, 10))
    expected = [0, 0, 1, 127, 128, 128, 191, 255, 255, 255]  # 127.5 rounds to even, as torch and NumPy do
    np.testing.assert_array_equal(to_uint8(sample)[0, 0, :, 0], expected)


def test_axes_and_half_precision() -> None:
    sample = np.zeros((2, 3, 4, 6), dtype=np.float16)
    sample[1, 2, 3, 5] = 1.0
    pixels = to_uint8(sample)
    assert pixels.shape == (2, 4, 6, 3)
    assert pixels[1, 3, 5].tolist() == [128, 128, 255]
    assert to_image(pixels[1]).size == (6, 4)


def test_png_carries_text_of_any_script() -> None:
    image = to_image(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    metadata = {"prompt": "a 🐱 кот", "negative_prompt": "", "seed": 2**64 - 1, "plan": {"rows": [1.5]}}
    read = Image.open(io.BytesIO(png_bytes(image, metadata)))
    assert read.text == {
        "prompt": "a 🐱 кот", "negative_prompt": "", "seed": "18446744073709551615", "plan": '{"rows": [1.5]}',
    }  # fmt: skip
    assert json.loads(read.text["plan"]) == {"rows": [1.5]}
    np.testing.assert_array_equal(np.asarray(read), np.asarray(image))
    assert Image.open(io.BytesIO(png_bytes(image))).text == {}


def test_save_png_is_atomic(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 2), "red")
    save_png(image, tmp_path / "x.png", {"seed": 1})
    assert Image.open(tmp_path / "x.png").text == {"seed": "1"}
    with pytest.raises(DestinationError):
        save_png(image, tmp_path / "no" / "x.png")


def test_grid() -> None:
    images = [Image.new("RGB", (3, 2), colour) for colour in ("red", "green", "blue")]
    sheet = grid(images, 2)
    assert sheet.size == (6, 4)
    assert [sheet.getpixel(xy) for xy in ((0, 0), (3, 0), (0, 2), (3, 2))] == [
        (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255),
    ]  # fmt: skip
    assert grid(images[:1], 4).size == (3, 2)


def test_read_image(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 2), (10, 20, 30, 255)).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png")
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (4, 2), (10, 20, 30))
    (tmp_path / "page.png").write_text("<html></html>")
    (tmp_path / "cut.png").write_bytes((tmp_path / "x.png").read_bytes()[:50])
    for name in ("page.png", "cut.png", "."):
        with pytest.raises(OptionError, match="is not a picture"):
            read_image(tmp_path / name)
    with pytest.raises(OptionError, match="does not exist"):
        read_image(tmp_path / "none.png")


def test_to_sample() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    sample = to_sample(Image.fromarray(pixels), 12, 8)
    assert sample.dtype == np.float32
    np.testing.assert_allclose(sample, pixels.transpose(2, 0, 1)[None] / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(to_uint8(sample)[0], pixels)


def test_to_sample_cuts_what_is_too_long() -> None:
    wide = Image.new("RGB", (40, 8), "black")
    wide.paste("white", (14, 0, 26, 8))  # the middle 12 columns
    np.testing.assert_allclose(to_sample(wide, 12, 8), 1.0)
    assert to_sample(wide.convert("L"), 24, 16).shape == (1, 3, 16, 24)
