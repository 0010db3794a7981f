"""A bundle whose pipeline is one graph: prompt ids and noise in, pixels out, in one call.

The schedule and the guidance are constants of the graph, so there is nothing here that could be set wrongly. Inputs:
`input_ids`, `negative_input_ids` under CFG, `noise`, and `step_noise` where the plan adds noise; SDXL's has the second
tokenizer's ids too, with _2 behind the name, and `time_ids`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hypersd_export.diffusion.table import StepTable
from hypersd_export.errors import BundleError
from hypersd_export.runtime.graph import Graph
from hypersd_export.runtime.groups import groups
from hypersd_export.runtime.result import Float
from hypersd_export.runtime.text import TIME_IDS, Ids

INPUTS = {"input_ids", "negative_input_ids", "noise", "step_noise"}
INPUTS |= {"input_ids_2", "negative_input_ids_2", TIME_IDS}
OUTPUTS = {"image", "latents"}


@dataclass(frozen=True, slots=True)
class SingleGraph:
    """The loaded graph, whose inputs and outputs are those that we know."""

    graph: Graph

    def __post_init__(self) -> None:
        """BundleError for a graph with other inputs or outputs, or of no fixed shape."""
        inputs = set(self.graph.inputs)
        odd = (inputs - INPUTS) | ({"input_ids", "noise"} - inputs) | (OUTPUTS ^ set(self.graph.outputs))
        free = {name for name, tensor in self.graph.inputs.items() if None in tensor.shape}
        if odd or free:
            names = ", ".join(sorted(odd | free))
            raise BundleError(f"{self.graph.path} does not fit this version ({names}): export the bundle again")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image's latents."""
        channels, height, width = self._shape("noise")[1:]
        return channels, height, width

    @property
    def tokens(self) -> int:
        """Length of a row of prompt ids."""
        return self._shape("input_ids")[1]

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(size for size in self.graph.inputs[name].shape if size is not None)

    def draw(
        self, ids: Sequence[Ids], noise: Float, table: StepTable, fresh: Callable[[int], Float],
        time_ids: Float | None = None,
    ) -> tuple[Float, npt.NDArray[np.uint8]]:  # fmt: skip
        """Latents [N, C, h, w] and pixels uint8 [N, H, W, 3] for noise [N, C, h, w].

        ids: of the prompt, before it those of the negative prompt under CFG. fresh: stream → noise like `noise`.
        time_ids: [1, 6], SDXL's. BundleError if graph and plan.json differ in their inputs.
        """
        size, streams = self._shape("noise")[0], table.noise_streams
        names = ["input_ids"] if len(ids) == 1 else ["negative_input_ids", "input_ids"]
        fixed: dict[str, npt.NDArray[Any]] = {
            name if number == 1 else f"{name}_{number}": np.repeat(row, size, axis=0)
            for name, text in zip(names, ids, strict=True)
            for number, row in enumerate(text, start=1)
        }
        if time_ids is not None:
            fixed[TIME_IDS] = np.repeat(time_ids, size, axis=0)
        wanted = {*fixed, "noise", *(["step_noise"] if streams else [])}
        if wanted != set(self.graph.inputs):
            raise BundleError(f"{self.graph.path} and plan.json are of two exports: export the bundle again")
        parts = [list(groups(noise, size))]
        parts += [list(groups(fresh(stream), size)) for stream in streams]
        latents, pixels = [], []
        for first, *others in zip(*parts, strict=True):
            feeds = {**fixed, "noise": first} | ({"step_noise": np.stack(others)} if others else {})
            outputs = self.graph.run(**feeds)
            latents.append(outputs["latents"])
            pixels.append(outputs["image"].astype(np.uint8))  # Core ML has whole numbers in float32
        count = len(noise)
        return np.concatenate(latents)[:count], np.concatenate(pixels)[:count]
