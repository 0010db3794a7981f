"""A bundle's Core ML packages as its runtime, on a Mac; each loaded when it is first needed.

A package is compiled by the system the first time; the compiled model stays in the user's cache for the next process.
What may run it (CPU, GPU, Neural Engine) is the export's `--compute-units`, or the caller's. The steps' arithmetic
stays on the host, in the code that the other runtimes walk. Packages in Apple's layout, or cut in two, are ours again
by ports and chains.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from hypersd_export.bundle.packages import PIPELINE, PackageRecord, check_function, package_records
from hypersd_export.errors import BundleError, OptionError
from hypersd_export.runtime.chain import chained
from hypersd_export.runtime.graph import Array, Graph, Run, Tensor, as_input
from hypersd_export.runtime.ports import Port, PortedGraph, Ports

UNITS = ("all", "cpu-only", "cpu-and-gpu", "cpu-and-ne")
"""What Core ML may use: --compute-units of the export, --provider of the runtime."""


class Model(Protocol):
    """A loaded package."""

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """The inputs by name."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs."""

    def predict(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """New arrays by name; an image output is one [1, 3, H, W], like the program's. BundleError if it fails."""


class Device(Protocol):
    """What loads packages: Core ML (`runtime.mac`), or what stands for it in tests."""

    @property
    def name(self) -> str:
        """The machine, for reports."""

    def load(self, package: Path, digest: str, units: str, function: str | None) -> Model:
        """Load a package's function (the only one, or the default, if None) to run on `units`; `digest` is the
        package's own. BundleError if it cannot be loaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CoreMLGraph:
    """A loaded package as a `Graph`."""

    path: Path
    model: Model

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """The inputs by name."""
        return self.model.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs."""
        return self.model.outputs

    def run(self, **feeds: npt.ArrayLike) -> dict[str, Array]:
        """See `Graph`; raises `BundleError` for inputs that the package does not have, or lacks."""
        tensors = self.inputs
        if set(feeds) != set(tensors):
            odd = ", ".join(sorted(set(feeds) ^ set(tensors)))
            raise BundleError(f"{self.path} takes other inputs ({odd}): export the bundle again")
        return self.model.predict({name: as_input(value, tensors[name]) for name, value in feeds.items()})

    def fixed(self, **feeds: npt.ArrayLike) -> Run:
        """`run` with these inputs given once and for all."""
        return functools.partial(self.run, **feeds)


@dataclass(kw_only=True)
class PackageRuntime:
    """`Runtime` of the packages of one bundle; on Core ML, make it with `open_packages`.

    packages: by component, in the order in which they are called. load: a package as a graph. ports: by component,
    where the packages have other names or shapes.
    """

    packages: Mapping[str, tuple[Path, ...]]
    load: Callable[[Path], Graph]
    provider: str
    ports: Mapping[str, Ports] = field(default_factory=dict)
    name: str = field(default="coreml", init=False)
    _graphs: dict[str, Graph] = field(default_factory=dict, init=False)

    @property
    def is_single_graph(self) -> bool:
        """Whether one package is the whole pipeline."""
        return PIPELINE in self.packages

    def graph(self, component: str) -> Graph:
        """A component's packages as one graph of our names, loaded at the first call; BundleError if it fails."""
        if component not in self._graphs:
            if component not in self.packages:
                there = ", ".join(self.packages)
                raise BundleError(f"no package of {component}, only of {there}: export the bundle again")
            graph = chained(tuple(map(self.load, self.packages[component])))
            ports = self.ports.get(component)
            self._graphs[component] = PortedGraph(graph=graph, ports=ports) if ports else graph
        return self._graphs[component]

    def single(self) -> Graph:
        """The package that is the whole pipeline; BundleError as `graph`."""
        return self.graph(PIPELINE)


def open_packages(
    path: Path, target: Mapping[str, Any], *, units: str | None = None, function: str | None = None,
    device: Device | None = None,
) -> PackageRuntime:  # fmt: skip
    """A bundle's packages on a device; nothing is loaded.

    Args:
        path: the bundle.
        target: its manifest's `targets["coreml"]`.
        units: one of `UNITS`; the export's if None.
        function: of packages that have several, the default if None.
        device: this machine's Core ML if None.

    Raises:
        BundleError: the records cannot be read.
        OptionError, MissingBackend: an unknown function or units, no Mac, or no coremltools.
    """
    wanted = str(target.get("compute_units", UNITS[0])) if units is None else units
    if wanted not in UNITS:
        raise OptionError(f"provider {wanted!r} of runtime 'coreml': choose one of {', '.join(UNITS)}")
    records = package_records(target, path / "manifest.json")
    functions = functions_of(path, records, check_function(target, function))
    if device is None:
        from hypersd_export.runtime import mac

        device = mac.open_device()
    opened = device
    digests = {path / file: digest for each in records.values()
               for file, digest in zip(each.packages, each.digests, strict=True)}  # fmt: skip

    def load(package: Path) -> Graph:
        if not package.is_dir():
            raise BundleError(f"{package} is missing: export the bundle again")
        return CoreMLGraph(path=package, model=opened.load(package, digests[package], wanted, functions[package]))

    return PackageRuntime(
        packages={name: tuple(path / file for file in record.packages) for name, record in records.items()},
        load=load,
        provider=f"{device.name}, Core ML on {wanted}",
        ports={name: ports_of(record) for name, record in records.items()},
    )


def functions_of(path: Path, records: Mapping[str, PackageRecord], function: str | None) -> dict[Path, str | None]:
    """The function to be loaded of each of a bundle's packages; None where a package has but one, or none is named."""
    return {path / file: function if record.functions else None
            for record in records.values() for file in record.packages}  # fmt: skip


def ports_of(record: PackageRecord) -> Ports:
    """Where our inputs and outputs lie in a component's packages."""
    return {name: Port.from_json(port) for name, port in record.ports.items()}
