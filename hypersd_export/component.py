"""One component as an ONNX graph, from what can be told another process in JSON: load → fuse → graph → target."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypersd_export import collector
from hypersd_export.bundle.span import Span
from hypersd_export.graphs.span import free_axes, traced_with
from hypersd_export.graphs.spec import DRAWING, Component, Graph, Shapes
from hypersd_export.verify.source import Source, SourceRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Former:
    """A component that was exported with other LoRAs: its stage's folder, and the modules that those changed."""

    stage: Path
    modules: frozenset[str]

    def refill(
        self, graph: Graph, module: Any, fused: Sequence[Mapping[str, Any]], folder: Path, also: Sequence[Path]
    ) -> tuple[dict[str, str], dict[str, Any]] | None:
        """The former graph with the weights of what these or the new LoRAs change: digests, and what build.json says.

        None, and nothing is written, where a graph does not hold those weights as they are (`targets.onnx_refill`).
        """
        from hypersd_export.targets import onnx_refill

        changed = self.modules.union(*(report["relative_norms"] for report in fused))
        weights = {id(module.get_submodule(name).weight) for name in changed}
        parameters = {name: weight for name, weight in graph.module.named_parameters() if id(weight) in weights}
        if len(parameters) < len(weights):
            return None
        digests = onnx_refill.refill(self.stage, parameters, folder, also=also)
        if digests is None:
            return None
        return digests, json.loads((self.stage / "build.json").read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentTask:
    """What the ONNX graphs of an export depend on, all components alike; `span` None where they are of one shape."""

    source: SourceRequest
    shapes: Shapes
    span: Span | None
    embedded_guidance: float | None
    """The guidance that is a constant of the UNet."""
    precision: str
    opset: int
    for_cpu: bool
    """Whether UNet and VAE are laid out for onnxruntime's CPU provider (`targets.onnx_cpu`)."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "source": self.source.to_json(),
            "shapes": self.shapes.to_json(),
            "span": None if self.span is None else self.span.to_json(),
            "embedded_guidance": self.embedded_guidance,
            "precision": self.precision,
            "opset": self.opset,
            "for_cpu": self.for_cpu,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ComponentTask":
        """Read what `to_json` wrote."""
        return cls(**{
            **data, "source": SourceRequest.from_json(data["source"]), "shapes": Shapes(**data["shapes"]),
            "span": Span.of(data),
        })  # fmt: skip

    def build(
        self, source: Source, component: Component, folder: Path, also: Sequence[Path] = (),
        former: Former | None = None,
    ) -> dict[str, str]:  # fmt: skip
        """Write `model.onnx`, `config.json` and `build.json`, which says how it went, into `folder`.

        `source` is `self.source`, opened. Weights that are in a file beside the graph go into each of `also` too; the
        SHA-256 of that file is returned by its name. `former` is the same of the same base with other LoRAs: where it
        can be, its graph is taken and nothing is traced. Raises `ModelError` and `LoraError` in one line.
        """
        import torch

        from hypersd_export.graphs.components import build_graph, component_config
        from hypersd_export.model.pages import drop_pages
        from hypersd_export.targets import onnx_fp16

        half = self.precision == "fp16"
        module, fused = source.load(component.source, torch.float16 if half else torch.float32)
        if half:
            onnx_fp16.check_weights(module, component)
        drop_pages()  # what was copied is not read again, and the rest not before it is saved
        guidance = self.embedded_guidance if component is Component.UNET else None
        config = component_config(component, module, self.shapes) | source.base.marks(component.source)
        shapes, axes = self.shapes, {}
        if self.span is not None:
            shapes, axes = traced_with(self.span, self.shapes), free_axes(self.span, component, self.shapes)
        graph = dataclasses.replace(build_graph(component, module, shapes, embedded_guidance=guidance), axes=axes)
        with collector.collected_after():  # exported programs are full of cycles, and the next component needs the room
            refilled = None if former is None else former.refill(graph, module, fused, folder, also)
            digests, notes = self._traced(graph, component, folder, also) if refilled is None else refilled
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "build.json").write_text(json.dumps(notes | {"fused": fused}), encoding="utf-8")
        return digests

    def _traced(
        self, graph: Graph, component: Component, folder: Path, also: Sequence[Path]
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """The graph, traced and translated: digests, and what build.json says of it."""
        from hypersd_export.targets import onnx, onnx_cpu, onnx_fp16

        for_cpu = self.for_cpu and component in DRAWING
        layout: dict[str, int] = {}
        edit = (lambda model: layout.update(onnx_cpu.lay_out(model))) if for_cpu else None
        if self.precision == "fp16":
            wide = onnx_cpu.WIDE if for_cpu else ()
            built = onnx_fp16.build(graph, folder, opset=self.opset, edit=edit, wide=wide, also=also)
        else:
            built = onnx.build(graph, folder, opset=self.opset, edit=edit, also=also)
        return onnx.digests(built), {"built": built, "fp32_nodes": [], "layout": layout}


def import_unet() -> None:
    """Import what building a UNet's graph imports, which takes seconds."""
    import onnxscript  # noqa: F401
    from diffusers import UNet2DConditionModel  # noqa: F401

    from hypersd_export.graphs import components, trace  # noqa: F401
