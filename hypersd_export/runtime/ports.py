"""A graph by other names: what a layout of other names and shapes calls our inputs and outputs.

Apple's runtime wants `encoder_hidden_states` as [B, C, 1, S] and calls the UNet's output `noise_pred`: with a port for
each the graph is one of ours again, and the pipeline need not know.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hypersd_export.runtime.graph import Array, Graph, Run, Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Port:
    """Where an input or output of ours lies in a graph.

    name: its name there. axes: for each axis there the one of ours that it is, or None for an axis of one element that
    ours lacks; () where the axes are ours.
    """

    name: str
    axes: tuple[int | None, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"name": self.name, "axes": list(self.axes)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Port":
        """Read what `to_json` wrote."""
        return cls(name=data["name"], axes=tuple(data["axes"]))

    def theirs(self, value: npt.ArrayLike) -> Array:
        """A value of ours with the axes that it has there."""
        array = np.asarray(value)
        if not self.axes:
            return array
        added = [number for number, axis in enumerate(self.axes) if axis is None]
        return np.expand_dims(array.transpose([axis for axis in self.axes if axis is not None]), added)

    def ours(self, array: Array) -> Array:
        """A value from there with the axes of ours."""
        if not self.axes:
            return array
        added = tuple(number for number, axis in enumerate(self.axes) if axis is None)
        return array.squeeze(added).transpose(np.argsort([axis for axis in self.axes if axis is not None]))

    def our_shape(self, shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """The shape of ours for a shape there."""
        if not self.axes:
            return shape
        return tuple(shape[self.axes.index(axis)] for axis in range(sum(axis is not None for axis in self.axes)))


Ports = Mapping[str, Port]
"""The ports of one graph by our names; what has none is called and shaped there as it is here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PortedGraph:
    """A `Graph` of our names and shapes around one of others."""

    graph: Graph
    ports: Ports

    @property
    def path(self) -> Path:
        """The file that the graph came from."""
        return self.graph.path

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """The inputs by our names, with our shapes."""
        tensors = self.graph.inputs
        return {
            name: Tensor(shape=port.our_shape(tensors[port.name].shape), dtype=tensors[port.name].dtype)
            for name, port in self._ports(tensors).items()
        }

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs by our names."""
        return tuple(self._ports(self.graph.outputs))

    def run(self, **feeds: npt.ArrayLike) -> dict[str, Array]:
        """See `Graph`."""
        ports = {name: self.ports.get(name, Port(name=name)) for name in feeds}
        found = self.graph.run(**{port.name: port.theirs(feeds[name]) for name, port in ports.items()})
        return {name: port.ours(found[port.name]) for name, port in self._ports(found).items()}

    def fixed(self, **feeds: npt.ArrayLike) -> Run:
        """See `Graph`."""
        return functools.partial(self.run, **feeds)

    def _ports(self, names: Iterable[str]) -> dict[str, Port]:
        """A port for each of these names there, by our name, in their order."""
        known = {port.name: name for name, port in self.ports.items()}
        return {known.get(name, name): self.ports[known[name]] if name in known else Port(name=name) for name in names}
