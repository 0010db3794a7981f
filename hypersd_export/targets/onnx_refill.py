"""A graph again with other weights of the same network, where nothing has to be traced: `hypersd-export refit`.

torch.onnx hands a parameter on as it is, or as a view of it: a transposed matrix, the half of one. `origins` finds by
the addresses of both where each initialiser lies in which parameter. One that the exporter's first graph used once, and
whose elements are all found, owes the graph nothing else: no constant that was folded out of it, no initialiser that
stands for another one too. Those can be changed; `refill` does what it is asked to in full or not at all. onnx_ir is
imported inside.
"""

import bisect
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypersd_export.targets import onnx

if TYPE_CHECKING:
    import onnx_ir
    import torch

ORIGINS = "weights.json"
"""In a stage's folder: the `Origin` of each initialiser that can be changed, by its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """A view of a parameter, its offset and strides in elements."""

    parameter: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def to_json(self) -> list[Any]:
        """Short, as there are hundreds."""
        return [self.parameter, self.offset, list(self.shape), list(self.strides)]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> "Origin":
        """Read what `to_json` wrote."""
        return cls(parameter=data[0], offset=data[1], shape=tuple(data[2]), strides=tuple(data[3]))

    def of(self, parameters: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """The view of another network's parameter."""
        parameter = parameters[self.parameter].detach()
        return parameter.as_strided(self.shape, self.strides, parameter.storage_offset() + self.offset)


def origins(model: "onnx_ir.Model", parameters: "Sequence[onnx_ir.Value]") -> dict[str, Origin]:
    """Of each initialiser that lies in a parameter: where. Both have to be in memory as torch has them."""
    places = []
    for value in parameters:
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.size:
            places.append((array.__array_interface__["data"][0], array.nbytes, array.dtype, str(value.name)))
    places.sort(key=lambda place: place[0])
    starts = [place[0] for place in places]
    found = {}
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        array = value.const_value.numpy()
        address = array.__array_interface__["data"][0]
        number = bisect.bisect_right(starts, address) - 1
        if number < 0 or not array.size:
            continue
        start, size, dtype, parameter = places[number]
        item = dtype.itemsize
        if address < start + size and array.dtype == dtype and (address - start) % item == 0:
            strides = tuple(step // item for step in array.strides)
            found[name] = Origin(
                parameter=parameter, offset=(address - start) // item, shape=array.shape, strides=strides
            )
    return found


def note(found: Mapping[str, Origin], parameters: "Sequence[onnx_ir.Value]", folder: Path) -> None:
    """Write down beside a graph where its weights come from, of each parameter that is whole in the initialisers
    `found`: a graph that computed a constant of it at export, or that shares it, would not follow it."""
    seen: Counter[str] = Counter()
    for origin in found.values():
        seen[origin.parameter] += math.prod(origin.shape)
    whole = {
        str(value.name) for value in parameters
        if value.const_value is not None and seen[str(value.name)] == value.const_value.size
    }  # fmt: skip
    kept = {name: origin.to_json() for name, origin in found.items() if origin.parameter in whole}
    (folder / ORIGINS).write_text(json.dumps(kept), encoding="utf-8")


def refill(
    stage: Path, parameters: "Mapping[str, torch.Tensor]", folder: Path, *, also: Sequence[Path] = ()
) -> dict[str, str] | None:
    """Write the graph of `stage` into `folder` with these parameters in the place of its own, all others as they are.

    Returns digests as `onnx.digests` does, a data file goes into each of `also` too; None, and nothing is written, if
    the graph does not have each of these parameters for itself.
    """
    import onnx_ir

    if not (stage / ORIGINS).is_file():
        return None
    text = (stage / ORIGINS).read_text(encoding="utf-8")
    found = {name: Origin.from_json(data) for name, data in json.loads(text).items()}
    if not parameters.keys() <= {origin.parameter for origin in found.values()}:
        return None
    model = onnx_ir.load(stage / onnx.MODEL_FILE)
    for name, origin in found.items():
        if origin.parameter in parameters:
            view = origin.of(parameters).numpy()
            model.graph.initializers[name].const_value = onnx_ir.Tensor(view, name=name)
    onnx.lay_out_initializers(model)
    onnx.forget_types(model)
    digest = onnx.save(model, folder, external=(stage / onnx.DATA_FILE).is_file(), also=also)
    inputs, outputs = ([str(value.name) for value in side] for side in (model.graph.inputs, model.graph.outputs))
    onnx.check(folder / onnx.MODEL_FILE, inputs, outputs)
    onnx.let_go(model.graph.initializers.values())
    (folder / ORIGINS).write_text(text, encoding="utf-8")
    return {} if digest is None else {onnx.DATA_FILE: digest}
