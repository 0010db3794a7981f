"""Core ML packages as graphs that run anywhere: a runtime whose graphs the MIL interpreter evaluates.

With it the verification of `verify/worker.py` and the bundle's own `Pipeline` hold packages against torch on a machine
without Core ML. What it rounds is what a package declares (`verify/mil`): an fp16 package shows half precision here.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from hypersd_export.bundle.packages import check_function, package_records
from hypersd_export.errors import BundleError, OptionError
from hypersd_export.runtime.coreml import PackageRuntime, functions_of, ports_of
from hypersd_export.runtime.graph import Array, Run, Tensor, as_input
from hypersd_export.runtime.ports import Ports
from hypersd_export.verify.mil import Package, open_package
from hypersd_export.verify.mil.file import NUMPY


@dataclass(frozen=True, kw_only=True, slots=True)
class InterpretedGraph:
    """A function of a package as a graph of the runtime; the default function if `function` is None."""

    package: Package
    function: str | None = None

    @property
    def path(self) -> Path:
        """The package's folder."""
        return self.package.file.path

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """The inputs by name."""
        return {
            name: Tensor(shape=given.kind.shape, dtype=NUMPY[given.kind.element])
            for name, given in self.package.function(self.function).inputs.items()
        }

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs."""
        return self.package.function(self.function).outputs

    def run(self, **feeds: npt.ArrayLike) -> dict[str, Array]:
        """Evaluate; inputs are cast to the package's types, outputs are new arrays. Raises `BundleError`."""
        known = self.inputs
        arrays = {name: as_input(value, known[name]) if name in known else value for name, value in feeds.items()}
        try:
            return self.package.evaluate(arrays, function=self.function)
        except OptionError as error:  # here the inputs are the bundle's business, not the user's
            raise BundleError(f"{error}: export the bundle again") from error

    def fixed(self, **feeds: npt.ArrayLike) -> Run:
        """`run` with these inputs given once and for all."""
        return functools.partial(self.run, **feeds)


class InterpretedRuntime(PackageRuntime):
    """The packages of one bundle, evaluated by the MIL interpreter.

    packages: by component, or the one of `PIPELINE`; several where one was cut into pieces, in their order. ports: by
    component, where the packages have another layout. functions: by package, where it has several.
    """

    def __init__(
        self, *, packages: Mapping[str, Path | tuple[Path, ...]], ports: Mapping[str, Ports] | None = None,
        functions: Mapping[Path, str | None] | None = None,
    ) -> None:  # fmt: skip
        named = functions or {}
        super().__init__(
            packages={name: given if isinstance(given, tuple) else (given,) for name, given in packages.items()},
            load=lambda package: InterpretedGraph(package=open_package(package), function=named.get(package)),
            provider="MIL interpreter",
            ports=ports or {},
        )


def interpreted(path: Path, target: Mapping[str, Any], function: str | None = None) -> InterpretedRuntime:
    """The packages of a bundle, `target` being its manifest's `targets["coreml"]`, and of those that have several
    functions this one or the default. Raises `BundleError`, and `OptionError` for a function that there is not."""
    records = package_records(target, path / "manifest.json")
    return InterpretedRuntime(
        packages={name: tuple(path / file for file in record.packages) for name, record in records.items()},
        ports={name: ports_of(record) for name, record in records.items()},
        functions=functions_of(path, records, check_function(target, function)),
    )
