"""What is exported: a base and the LoRAs fused into it, opened and checked but loaded one component at a time.

The export and the verification's own process both start from the same `SourceRequest`, which is plain data.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypersd_export.errors import ParityError

if TYPE_CHECKING:
    import torch

    from hypersd_export.model.base import BaseModel
    from hypersd_export.model.lora import LoraFile


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRequest:
    """Which base, with which replacements and LoRAs (path and scale); plain data that travels as JSON."""

    base: str
    unet: str | None = None
    vae: str | None = None
    variant: str | None = None
    revision: str | None = None
    loras: tuple[tuple[str, float], ...] = ()
    allow_pickle: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SourceRequest":
        """Read what `to_json` wrote."""
        loras = tuple((str(path), float(scale)) for path, scale in data["loras"])
        return cls(**{**data, "loras": loras})


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """An opened base and its LoRAs with their scales."""

    base: "BaseModel"
    loras: "tuple[tuple[LoraFile, float], ...]" = ()

    @property
    def digests(self) -> dict[str, Any]:
        """sha256 of the base and of every LoRA, with the scales: the identity of the fused weights."""
        return {
            "base": self.base.digest,
            "loras": [{"digest": lora.digest, "scale": scale} for lora, scale in self.loras],
        }

    @property
    def configs(self) -> dict[str, dict[str, Any]]:
        """The config.json of every component by name."""
        return {name: self.base.component_config(name) for name in self.base.parts}

    def loras_of(self, component: str) -> "list[tuple[LoraFile, float]]":
        """The LoRAs that change a component."""
        return [(lora, scale) for lora, scale in self.loras if lora.components.get(component)]

    def load(self, component: str, dtype: "torch.dtype") -> "tuple[torch.nn.Module, list[dict[str, Any]]]":
        """A component with its LoRAs fused, in eval mode without gradients, and a report on each fusion.

        Fusing is done in float32 and proven (`model.fuse`), and rounded once, whatever `dtype` is; one weight at a
        time, so that no float32 copy of the network is ever there. Raises `ModelError`, `LoraError`.
        """
        from hypersd_export.model.fuse import Fusion, fuse_all
        from hypersd_export.model.parts import cast

        found = self.loras_of(component)
        if not found:
            return self.base.load(component, dtype), []
        module = self.base.load(component, None)
        fusions = [
            Fusion(deltas=lora.components[component], scale=scale, source=lora.path.name) for lora, scale in found
        ]
        reports = fuse_all(module, fusions, component=component, dtype=dtype)
        cast(module, dtype)
        return module, [
            {"file": fusion.source, **report.to_json()} for fusion, report in zip(fusions, reports, strict=True)
        ]

    def check_loras(self) -> None:
        """`LoraError` for a LoRA with a key or a shape that does not fit, found without loading any weights."""
        from hypersd_export.model.fuse import match

        for component in self.base.parts:
            found = self.loras_of(component)
            skeleton = self.base.skeleton(component) if found else None
            for lora, _ in found:
                assert skeleton is not None
                match(skeleton, lora.components[component], component=component, source=lora.path.name)

    def warnings(self) -> list[str]:
        """One line for each LoRA that was trained on another base of the same architecture."""
        from hypersd_export.model.lora import base_warning

        return [line for lora, _ in self.loras if (line := base_warning(lora, self.base)) is not None]


def open_source(request: SourceRequest) -> Source:
    """Find and check a base and its LoRAs, loading nothing; raises `ModelError` or `LoraError` in one line."""
    from hypersd_export.model.base import open_base
    from hypersd_export.model.lora import check_components, read_lora

    base = open_base(
        request.base,
        variant=request.variant,
        revision=request.revision,
        unet=request.unet,
        vae=request.vae,
        allow_pickle=request.allow_pickle,
    )
    base.require_exportable()
    loras = tuple((read_lora(path, allow_pickle=request.allow_pickle), scale) for path, scale in request.loras)
    for lora, _ in loras:
        check_components(lora, base.parts)
    return Source(base=base, loras=loras)


def check_unchanged(source: Source, digests: Mapping[str, Any]) -> None:
    """Refuse to compare with files that were changed since they were exported."""
    if source.digests != digests:
        raise ParityError("the base or a LoRA changed on disk while it was being exported: run the export again")
