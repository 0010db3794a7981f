"""Instances of pictures from a JSON file in COCO's form, as they lie in the squares that training crops."""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from hypersd_export.errors import DataError
from hypersd_export.model.files import read_json
from trainer.data.pictures import square
from trainer.rewards.structure import Instances

LEAST_SHARE = 1e-3
"""Of the square: what the crop has left less of than this is not asked for (ours)."""


class CocoInstances:
    """Polygons by file name, as masks; crowds are left out. classes: the segmenter's numbers by category name.

    DataError for a file that is not COCO's instances, a category that the segmenter does not know, an instance that is
    no polygon, and a picture that the file does not list.
    """

    def __init__(self, path: Path, classes: Mapping[str, int], size_px: int) -> None:
        self.path, self._size = path, size_px
        content = read_json(path, DataError)
        try:
            names = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
            shapes = {
                image["id"]: (PurePosixPath(image["file_name"]).name, (int(image["width"]), int(image["height"])))
                for image in content["images"]
            }
            known = [entry for entry in content["annotations"] if not entry.get("iscrowd")]
            unknown = sorted({names[entry["category_id"]] for entry in known} - set(classes))
            self._sizes = dict(shapes.values())
            self._polygons: dict[str, list[tuple[int, Any]]] = {name: [] for name in self._sizes}
            for entry in known:
                number = classes.get(names[entry["category_id"]], -1)
                self._polygons[shapes[entry["image_id"]][0]].append((number, entry["segmentation"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: not instances in COCO's form ({type(error).__name__}: {error})") from error
        if unknown:
            raise DataError(f"{path}: the segmenter has no class {unknown[0]!r} (of {len(unknown)}); take one of COCO")

    def __call__(self, names: Sequence[str]) -> list[Instances]:
        """The instances of each picture: masks bool [n, size_px, size_px]."""
        return [self._of(PurePosixPath(name).name) for name in names]

    def _of(self, name: str) -> Instances:
        if name not in self._sizes:
            raise DataError(f"{self.path}: does not list {name}; take the annotations of this data")
        found = [(number, self._mask(polygons, name)) for number, polygons in self._polygons[name]]
        kept = [(number, mask) for number, mask in found if mask.mean() >= LEAST_SHARE]
        masks = torch.zeros(len(kept), self._size, self._size, dtype=torch.bool)
        for row, (_, mask) in zip(masks, kept, strict=True):
            row[:] = torch.from_numpy(mask)
        return Instances(masks, torch.tensor([number for number, _ in kept], dtype=torch.int64))

    def _mask(self, polygons: Any, name: str) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """bool [size_px, size_px], cropped as the picture is."""
        from PIL import Image, ImageDraw

        if not isinstance(polygons, list):
            raise DataError(f"{self.path}: an instance of {name} is run-length coded; only polygons are read")
        whole = Image.new("L", self._sizes[name])
        draw = ImageDraw.Draw(whole)
        for polygon in polygons:
            draw.polygon([float(value) for value in polygon], fill=255)
        return np.asarray(square(whole, self._size)) > 127
