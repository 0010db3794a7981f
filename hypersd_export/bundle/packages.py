"""What the manifest says about Core ML packages: which there are, and where our inputs and outputs lie in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypersd_export.bundle.digest import is_outside
from hypersd_export.errors import BundleError, OptionError

PIPELINE = "pipeline"
"""The component that is the whole pipeline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackageRecord:
    """A component's packages, in the order in which they are called: paths in the bundle, and their digests.

    ports: plain JSON of `runtime.ports`, by our names; {} where the package has those. functions: the names of those
    that each of the packages has, where they have several; the first is the default.
    """

    packages: tuple[str, ...]
    digests: tuple[str, ...]
    ports: Mapping[str, Any]
    functions: tuple[str, ...] = ()


def package_records(target: Mapping[str, Any], where: Path | str = "manifest.json") -> dict[str, PackageRecord]:
    """The packages of a manifest's `targets["coreml"]`, by component; of a single graph there is one, `PIPELINE`.

    Raises:
        BundleError: there are none, or a record cannot be read.
    """
    components = target.get("components")
    if not isinstance(components, Mapping) or not components:
        raise BundleError(f"{where} lists no Core ML packages: export the bundle again with --target coreml")
    try:
        found = {
            str(name): PackageRecord(
                packages=tuple(map(str, entry["packages"])),
                digests=tuple(map(str, entry["digests"])),
                ports=dict(target["ports"].get(name, {})),
                functions=tuple(map(str, entry.get("functions", ()))),
            )
            for name, entry in components.items()
        }
    except (TypeError, KeyError, AttributeError) as error:
        raise BundleError(
            f"{where} has unusable records of Core ML packages ({error!r:.80}): export it again"
        ) from error
    for name, record in found.items():
        if not record.packages or len(record.packages) != len(record.digests):
            raise BundleError(f"{where} names no packages of {name}: export the bundle again")
        for file in record.packages:
            if is_outside(file):
                raise BundleError(f"{where} names {file[:80]!r}, outside the bundle: do not trust this bundle")
    return found


def check_function(target: Mapping[str, Any], function: str | None) -> str | None:
    """The function itself; `OptionError` for one that a manifest's `targets["coreml"]` does not name."""
    known = list(target.get("functions", {}))
    if function is not None and function not in known:
        there = f"choose {', '.join(known)}" if known else "it has none; merge bundles with hypersd-export coreml-merge"
        raise OptionError(f"function {function} is not in this bundle: {there}")
    return function
