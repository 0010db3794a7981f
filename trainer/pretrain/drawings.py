"""The drawings that the built-in model learns from: one lossless WebP atlas, rendered once from three icon sets.

The atlas is a grid of square RGBA tiles, row-major over (concept, style). Rendering needs the unpacked icon
packages (`@iconify-json/*`) and `resvg-py`; reading needs Pillow alone.
"""

import functools
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hypersd_export.errors import DataError
from trainer.pretrain.concepts import CONCEPTS, ICON_SETS, STYLES

ATLAS = Path(__file__).parent / "drawings.webp"
TILE_PX = 128
COLUMNS = 18


@dataclass(frozen=True, slots=True)
class Drawings:
    """All drawings as uint8 RGBA, straight alpha: [concept, style, height, width, 4]."""

    rgba: np.ndarray

    @property
    def tile_px(self) -> int:
        """Edge of one drawing in pixels."""
        return int(self.rgba.shape[2])


def read_drawings(path: Path = ATLAS) -> Drawings:
    """Read the atlas. Raises DataError when the file is missing or is not the atlas of this vocabulary."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGBA"))
    except OSError as error:
        raise DataError(f"{path}: drawings cannot be read ({error}); restore the file from the repository") from error
    count = len(CONCEPTS) * len(STYLES)
    rows = -(-count // COLUMNS)
    if pixels.shape[:2] != (rows * TILE_PX, COLUMNS * TILE_PX):
        raise DataError(
            f"{path}: {pixels.shape[:2]} pixels, but {count} drawings need {rows * TILE_PX}x{COLUMNS * TILE_PX}"
        )
    tiles = pixels.reshape(rows, TILE_PX, COLUMNS, TILE_PX, 4).swapaxes(1, 2).reshape(-1, TILE_PX, TILE_PX, 4)
    return Drawings(tiles[:count].reshape(len(CONCEPTS), len(STYLES), TILE_PX, TILE_PX, 4))


def render_drawings(icons: Path, out: Path = ATLAS) -> None:
    """Render every (concept, style) from `icons`/<set>/icons.json and write the atlas.

    `icons` holds the unpacked packages noto, twemoji and fluent-emoji-flat. Each drawing is scaled to its own
    bounding box, so that "size" is ours to vary and not the set's. Raises DataError on a missing drawing.
    """
    tiles = [_render(icons, concept, style) for concept in CONCEPTS for style in STYLES]
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * TILE_PX, rows * TILE_PX))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % COLUMNS * TILE_PX, i // COLUMNS * TILE_PX))
    sheet.save(out, lossless=True, quality=100, method=6)


@functools.cache
def _icons(path: Path) -> dict[str, Any]:
    """An icon set's JSON; read once, since each is up to 25 MB."""
    icons: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return icons


def _render(icons: Path, concept: str, style: str) -> Image.Image:
    """One drawing, cropped to what is visible and centred on a transparent square of TILE_PX."""
    import resvg_py

    path = icons / ICON_SETS[style] / "icons.json"
    data = _icons(path)
    if concept not in data["icons"]:
        raise DataError(f"{path} has no drawing named {concept!r}; choose a concept that all sets have")
    width, height = data.get("width", 16), data.get("height", 16)
    body = data["icons"][concept]["body"]
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {names} viewBox="0 0 {width} {height}">{body}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * TILE_PX, height=2 * TILE_PX))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    box = image.getchannel("A").getbbox()
    if box is None:
        raise DataError(f"{path}: drawing {concept!r} is empty")
    side = max(box[2] - box[0], box[3] - box[1])
    square = Image.new("RGBA", (side, side))
    square.paste(image.crop(box), ((side - box[2] + box[0]) // 2, (side - box[3] + box[1]) // 2))
    premultiplied = square.convert("RGBa").resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS)
    return premultiplied.convert("RGBA")
