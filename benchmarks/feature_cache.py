"""Arrays kept by what they were computed from, so that one more contestant costs only its own pictures."""

import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hypersd_export.bundle.digest import canonical_json, digest_json
from hypersd_export.bundle.disk import write_atomic
from hypersd_export.errors import DataError, DestinationError

Arrays = dict[str, np.ndarray]


class FeatureCache:
    """One .npz per key; the key (JSON data) is stored inside and compared, and files are written whole or not at all.

    hits and misses are counted. A file that cannot be read is a `DataError`: it is never taken for a miss.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.hits, self.misses = folder, 0, 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DestinationError(f"--cache {folder}: cannot be made ({os.strerror(error.errno or 0)})") from None

    def get(self, key: Mapping[str, Any], compute: Callable[[], Arrays]) -> Arrays:
        """The arrays of `key`, computed and stored if they are not there."""
        path = self.folder / f"{digest_json(key)}.npz"
        if path.is_file():
            self.hits += 1
            return self._read(path, key)
        self.misses += 1
        arrays = compute()
        stream = io.BytesIO()
        np.savez(stream, **arrays, key=np.array(canonical_json(key)))  # type: ignore[arg-type]
        write_atomic(path, stream.getvalue())
        return arrays

    def _read(self, path: Path, key: Mapping[str, Any]) -> Arrays:
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            same = json.loads(str(arrays.pop("key"))) == json.loads(canonical_json(key))
        except Exception as error:  # numpy and zipfile raise whatever a damaged file brings about
            raise DataError(
                f"{path} cannot be read ({type(error).__name__}); delete it, and it is made again"
            ) from None
        if not same:
            raise DataError(f"{path} was made of something else than its name says; delete it, and it is made again")
        return arrays
