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
from hypersd_export.graphs.spec import DRAWING, Component, Shapes
from hypersd_export.verify.source import Source, SourceRequest


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

    def build(self, source: Source, component: Component, folder: Path, also: Sequence[Path] = ()) -> dict[str, str]:
        """Write `model.onnx`, `config.json` and `build.json`, which says how it went, into `folder`.

        `source` is `self.source`, opened. Weights that are in a file beside the graph go into each of `also` too; the
        SHA-256 of that file is returned by its name. Raises `ModelError` and `LoraError` in one line.
        """
        import torch

        from hypersd_export.graphs.components import build_graph, component_config
        from hypersd_export.model.pages import drop_pages
        from hypersd_export.targets import onnx, onnx_cpu, onnx_fp16

        half = self.precision == "fp16"
        module, fused = source.load(component.source, torch.float16 if half else torch.float32)
        if half:
            onnx_fp16.check_weights(module.half(), component)
        drop_pages()  # what was copied is not read again, and the rest not before it is saved
        guidance = self.embedded_guidance if component is Component.UNET else None
        config = component_config(component, module, self.shapes) | source.base.marks(component.source)
        shapes, axes = self.shapes, {}
        if self.span is not None:
            shapes, axes = traced_with(self.span, self.shapes), free_axes(self.span, component, self.shapes)
        graph = dataclasses.replace(build_graph(component, module, shapes, embedded_guidance=guidance), axes=axes)
        with collector.collected_after():  # exported programs are full of cycles, and the next component needs the room
            for_cpu = self.for_cpu and component in DRAWING
            layout: dict[str, int] = {}
            edit = (lambda model: layout.update(onnx_cpu.lay_out(model))) if for_cpu else None
            if half:
                wide = onnx_cpu.WIDE if for_cpu else ()
                built = onnx_fp16.build(graph, folder, opset=self.opset, edit=edit, wide=wide, also=also)
            else:
                built = onnx.build(graph, folder, opset=self.opset, edit=edit, also=also)
        digests = onnx.digests(built)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        notes = {"built": built, "fused": fused, "fp32_nodes": [], "layout": layout}
        (folder / "build.json").write_text(json.dumps(notes), encoding="utf-8")
        return digests


def import_unet() -> None:
    """Import what building a UNet's graph imports, which takes seconds."""
    import onnxscript  # noqa: F401
    from diffusers import UNet2DConditionModel  # noqa: F401

    from hypersd_export.graphs import components, trace  # noqa: F401
