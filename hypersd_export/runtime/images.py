"""Arrays to pictures: rounding, PNG with its provenance, grids, and pictures as input.

Pillow is imported inside, and of its formats only what a call needs.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hypersd_export.bundle.disk import write_atomic
from hypersd_export.errors import OptionError

if TYPE_CHECKING:
    from PIL.Image import Image

Uint8 = npt.NDArray[np.uint8]


def to_uint8(sample: npt.NDArray[Any]) -> Uint8:
    """Decoder output [N, 3, H, W] in [-1, 1] to pixels uint8 [N, H, W, 3], rounded as diffusers' VaeImageProcessor."""
    pixels = (sample.astype(np.float32) / 2 + 0.5).clip(0, 1)
    return (pixels.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)


def to_image(pixels: Uint8) -> "Image":
    """Pixels uint8 [H, W, 3] as a Pillow image."""
    from PIL import Image

    return Image.fromarray(pixels)


class _PngStream(io.BytesIO):
    """Memory with a file name, by which Pillow loads this one format; by `format="PNG"` it would load several."""

    name = "picture.png"


def png_bytes(image: "Image", metadata: Mapping[str, Any] | None = None) -> bytes:
    """The image as a PNG file with text chunks.

    Args:
        image: what to write.
        metadata: text as it is, anything else as JSON; chunks are tEXt, or iTXt where Latin-1 does not suffice.
    """
    from PIL import PngImagePlugin

    chunks = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        chunks.add_text(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    stream = _PngStream()
    image.save(stream, pnginfo=chunks)
    return stream.getvalue()


def save_png(image: "Image", path: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a PNG (see `png_bytes`) that is there whole or not at all; `DestinationError` if that cannot be."""
    write_atomic(path, png_bytes(image, metadata))


def grid(images: Sequence["Image"], columns: int) -> "Image":
    """Pictures of one size in rows of `columns`, without gaps; what is left of the last row is white."""
    from PIL import Image

    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (min(columns, len(images)) * width, rows * height), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * width, number // columns * height))
    return sheet


def enlarged(image: "Image", times: int) -> "Image":
    """Each pixel as a square of `times` × `times`: small models' pictures on large screens, without smoothing."""
    from PIL import Image

    if times == 1:
        return image
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def read_image(path: Path) -> "Image":
    """A picture from a file, upright and in RGB.

    Raises:
        OptionError: there is no such file, or Pillow cannot read it.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise OptionError(f"--init-image {path} does not exist") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OptionError(f"--init-image {path} is not a picture that can be read: {str(error)[:80]}") from error


def to_sample(image: "Image", width: int, height: int) -> npt.NDArray[np.float32]:
    """A picture as encoder input [1, 3, height, width] in [-1, 1]; scaled, and cut at the longer side's two ends.

    Deviation from diffusers' VaeImageProcessor, which stretches a picture of other proportions.
    """
    from PIL import Image, ImageOps

    image = image.convert("RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, dtype=np.float32) / 255
    return (pixels * 2 - 1).transpose(2, 0, 1)[None].astype(np.float32)
