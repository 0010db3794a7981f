"""Graphs of free shapes at the ends of their ranges: each artifact against torch there, on seeded inputs.

The gates of `verify.worker` hold the export's own shapes. An axis that was traced as a constant shows at another size.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hypersd_export.graphs.spec import Component, Shapes
from hypersd_export.runtime.graph import Graph
from hypersd_export.verify.gates import Gate

CORNER_SEED = 20_27


@dataclass(frozen=True, kw_only=True, slots=True)
class Corner:
    """What torch gives for one component at some shapes: inputs and outputs by name."""

    where: str
    inputs: dict[str, npt.NDArray[Any]]
    outputs: dict[str, npt.NDArray[np.float32]]

    def compare(self, gate: Gate, graph: Graph) -> None:
        """Hold the artifact against it."""
        for name, found in graph.run(**self.inputs).items():
            gate.compare(found, self.outputs[name], f"in {name} at {self.where}")


def corners_of(
    component: Component, module: Any, corners: Sequence[Shapes], shapes: Shapes, embedded_guidance: float | None
) -> list[Corner]:
    """What a loaded torch component gives at these shapes, for `graphs.components.build_graph`'s inputs of one seed.

    Text encoders see no picture: theirs are the numbers of images other than that of `shapes`.
    """
    import torch

    from hypersd_export.graphs.components import build_graph

    if component in (Component.TEXT_ENCODER, Component.TEXT_ENCODER_2):
        batches = dict.fromkeys(corner.batch for corner in corners if corner.batch != shapes.batch)
        corners = [dataclasses.replace(shapes, batch=batch) for batch in batches]
    embedded = embedded_guidance if component is Component.UNET else None
    found = []
    for corner in corners:
        graph = build_graph(component, module, corner, embedded_guidance=embedded, seed=CORNER_SEED)
        with torch.no_grad():
            made = graph.module(*graph.inputs.values())
        outputs = [value.float().numpy() for value in (made if isinstance(made, Sequence) else (made,))]
        found.append(
            Corner(
                where=f"{corner.width}x{corner.height}, {corner.batch} at once",
                inputs={name: value.numpy() for name, value in graph.inputs.items()},
                outputs=dict(zip(graph.output_names, outputs, strict=True)),
            )
        )
    return found
