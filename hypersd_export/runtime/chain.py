"""Graphs one behind the other as one: a network that was cut because a device does not load it whole."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy.typing as npt

from hypersd_export.runtime.graph import Array, Graph, Run, Tensor


@dataclass(frozen=True, slots=True)
class Chain:
    """A `Graph` of several: each is fed the outputs of those before it, by name, and the inputs of the whole."""

    graphs: tuple[Graph, ...]

    @property
    def path(self) -> Path:
        """The file of the first."""
        return self.graphs[0].path

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """What no graph before makes."""
        found: dict[str, Tensor] = {}
        made: set[str] = set()
        for graph in self.graphs:
            found |= {name: tensor for name, tensor in graph.inputs.items() if name not in made}
            made |= set(graph.outputs)
        return found

    @property
    def outputs(self) -> tuple[str, ...]:
        """Those of the last."""
        return self.graphs[-1].outputs

    def run(self, **feeds: npt.ArrayLike) -> dict[str, Array]:
        """See `Graph`."""
        known: dict[str, npt.ArrayLike] = dict(feeds)
        found: dict[str, Array] = {}
        for graph in self.graphs:
            found = graph.run(**{name: known[name] for name in graph.inputs if name in known})
            known |= found
        return found

    def fixed(self, **feeds: npt.ArrayLike) -> Run:
        """See `Graph`."""
        return functools.partial(self.run, **feeds)


def chained(graphs: tuple[Graph, ...]) -> Graph:
    """One graph of these: itself where there is one."""
    return graphs[0] if len(graphs) == 1 else Chain(graphs)
