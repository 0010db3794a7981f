"""Core ML packages as graphs that run anywhere: a runtime whose graphs the MIL interpreter evaluates.

With it the verification of `verify/worker.py` and the bundle's own `Pipeline` hold packages against torch on a machine
without Core ML. What it rounds is what a package declares (`verify/mil`): an fp16 package shows half precision here.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy.typing as npt

from hypersd_export.errors import BundleError, OptionError
from hypersd_export.runtime.chain import chained
from hypersd_export.runtime.graph import Array, Graph, Run, Tensor, as_input
from hypersd_export.runtime.ports import PortedGraph, Ports
from hypersd_export.verify.mil import Package, open_package
from hypersd_export.verify.mil.file import NUMPY

SINGLE = "pipeline"
"""The name of the package that is a whole pipeline."""


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


@dataclass(kw_only=True)
class InterpretedRuntime:
    """The packages of one bundle, evaluated by the MIL interpreter.

    packages: by component, or the one of `SINGLE`; several where one was cut into pieces, in their order. ports: by
    component, where the packages have another layout.
    """

    packages: Mapping[str, Path | tuple[Path, ...]]
    ports: Mapping[str, Ports] = field(default_factory=dict)
    name: str = field(default="coreml", init=False)
    provider: str = field(default="MIL interpreter", init=False)
    _graphs: dict[str, Graph] = field(default_factory=dict)

    @property
    def is_single_graph(self) -> bool:
        """Whether there is one package for the whole pipeline."""
        return SINGLE in self.packages

    def graph(self, component: str) -> Graph:
        """A component's package as a graph, read at the first call; `BundleError` if there is none or it is damaged."""
        if component not in self.packages:
            raise BundleError(f"no package of {component}, only of {', '.join(self.packages)}: export the bundle again")
        if component not in self._graphs:
            given = self.packages[component]
            paths = given if isinstance(given, tuple) else (given,)
            graph = chained(tuple(InterpretedGraph(package=open_package(path)) for path in paths))
            ports = self.ports.get(component)
            self._graphs[component] = PortedGraph(graph=graph, ports=ports) if ports else graph
        return self._graphs[component]

    def single(self) -> Graph:
        """The whole pipeline's package as a graph; `BundleError` as `graph`."""
        return self.graph(SINGLE)
