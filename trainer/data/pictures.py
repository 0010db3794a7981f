"""From an image file to the square of 8-bit RGB that the VAE encodes."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trainer.data.records import BadSample, Reason

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def read_picture(picture: Path | bytes, size_px: int) -> npt.NDArray[np.uint8]:
    """uint8 [size_px, size_px, 3]: turned as EXIF says, shorter side to `size_px` (Lanczos), centre crop.

    BadSample for what cannot be used. Ours: a picture smaller than `size_px` is not used, since enlarging it would
    teach the blur (diffusers' scripts enlarge); what is transparent is white (PIL alone shows what lies hidden there).
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            _check(image, Image.MAX_IMAGE_PIXELS)
            turned = ImageOps.exif_transpose(image)
            cropped = square(_opaque(turned), size_px)
    except BadSample:
        raise
    except Image.DecompressionBombError as e:
        raise BadSample(Reason.TOO_MANY_PIXELS, str(e)) from e
    except Exception as e:  # a damaged file makes PIL's decoders raise nearly anything
        raise BadSample(Reason.UNREADABLE, (str(e).strip() or type(e).__name__).splitlines()[0][:160]) from e
    return np.asarray(cropped)


def _check(image: "Image", limit: int | None) -> None:
    if min(image.size) < 1:
        raise BadSample(Reason.NO_PIXELS, f"{image.width}x{image.height}")
    if limit is not None and image.width * image.height > limit:
        raise BadSample(Reason.TOO_MANY_PIXELS, f"{image.width}x{image.height} where PIL's limit is {limit}")
    if image.mode.startswith(("I", "F")):
        raise BadSample(Reason.NOT_8_BIT, f"mode {image.mode}")


def _opaque(image: "Image") -> "Image":
    """As RGB, composited on white where there is transparency."""
    from PIL import Image

    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def square(image: "Image", size_px: int) -> "Image":
    """Shorter side to `size_px`, centre crop; BadSample for what is smaller. Masks are cropped with it too."""
    from PIL import Image

    short = min(image.size)
    if short < size_px:
        raise BadSample(Reason.TOO_SMALL, f"{image.width}x{image.height} where {size_px} px are needed")
    width, height = (max(size_px, round(side * size_px / short)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size_px) // 2, (height - size_px) // 2
    return image.crop((left, top, left + size_px, top + size_px))
