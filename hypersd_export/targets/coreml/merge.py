"""Several packages as the functions of one, which share the weights that they have in common (from iOS 18 on)."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypersd_export.targets.coreml import package, vendor


def build(sources: Mapping[str, Path], path: Path) -> dict[str, Any]:
    """Write the packages `sources`, by the name of the function that each becomes, as the package `path`.

    The first is the default. Returns what the manifest says: the package's figures (ops are the default function's),
    the functions, and the bytes of the packages by themselves.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        beside = {
            name: package.stand_in(source, Path(folder) / f"{number}.mlpackage")
            for number, (name, source) in enumerate(sources.items())
        }
        vendor.merge(beside, path)
    package.tidy(path)
    apart = sum(package.facts(source)["bytes"] for source in sources.values())
    return {**package.facts(path), "bytes_apart": apart, "functions": list(sources)}
