"""Rows in groups of the size that a graph takes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt


def groups(rows: npt.NDArray[Any], size: int) -> Iterator[npt.NDArray[Any]]:
    """Rows in groups of exactly `size`; the last one is filled up with copies of its last row."""
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        yield part if len(part) == size else np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
