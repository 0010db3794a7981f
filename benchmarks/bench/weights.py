"""The weights that a bundle was made of, for the same pipeline in torch: its base and its LoRAs by their digests.

A manifest has names and digests and no paths. The built-in model and its LoRAs are found by themselves, a hub id is
fetched again; for all else the caller says where it is, and the digests say whether it is that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypersd_export.bundle.manifest import Manifest, read_manifest
from hypersd_export.diffusion import FewStepPlan, Guidance, PlanEntry, PlanFile, Solver, plan_from_scheduler_config
from hypersd_export.errors import BundleError, ModelError, OptionError, PlanError
from hypersd_export.model.families import Family
from hypersd_export.runtime.folder import Folder
from hypersd_export.spec import BUILTIN
from hypersd_export.verify.source import Source, SourceRequest, open_source

if TYPE_CHECKING:
    from benchmarks.sampling import Parts


DTYPES = {"fp32": "float32", "fp16": "float16"}
"""torch's names of the precisions that torch's pipelines are measured in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where the base, another UNet or VAE, and the LoRAs are now, if the manifest's own words do not lead there."""

    base: str | None = None
    unet: str | None = None
    vae: str | None = None
    loras: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"base": self.base, "unet": self.unet, "vae": self.vae, "loras": list(self.loras)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Places":
        """Read what `to_json` wrote."""
        return cls(**{**data, "loras": tuple(data["loras"])})


def source_of(bundle: Path, places: Places, *, loras: bool = True) -> Source:
    """Base and LoRAs of a bundle, opened and checked, nothing loaded; without `loras` the teacher's weights.

    Raises:
        OptionError: a LoRA is not found, or what is found has another digest.
        BundleError, ModelError, LoraError: the manifest, the base or a LoRA cannot be used.
    """
    manifest = read_manifest(bundle)
    options = manifest.options
    base = places.base or options.get("base")
    if not base:
        raise BundleError(f"{bundle} does not say which base it was made of: export it again")
    files = find_loras(bundle, manifest, places) if loras else []
    request = SourceRequest(
        base=base, unet=places.unet or options.get("unet"), vae=places.vae or options.get("vae"),
        variant=options.get("variant"), revision=options.get("revision"),
        allow_pickle=bool(options.get("allow_pickle")), loras=tuple(files),
    )  # fmt: skip
    try:
        source = open_source(request)
    except ModelError as error:
        raise ModelError(f"{error} ({bundle.name} was made of it: say where it is with --base)") from error
    if source.base.digest != manifest.base["digest"]:
        raise OptionError(
            f"{bundle.name} was made of {manifest.base['name']}, sha256 {manifest.base['digest'][:8]}…, and the base "
            f"here has {source.base.digest[:8]}…: name the right one with --base, --unet and --vae"
        )
    if source.base.family is Family.sdxl:
        raise OptionError(f"{bundle.name} is SDXL's, and --vs draws Stable Diffusion 1.x and 2.x: leave it away")
    return source


def find_loras(bundle: Path, manifest: Manifest, places: Places) -> list[tuple[str, float]]:
    """(path, scale) of the manifest's LoRAs, among those that were named and the built-in model's own."""
    from hypersd_export import builtin
    from hypersd_export.model.lora import read_lora

    shipped = sorted((builtin.model_dir().parent / "lora").glob("*.safetensors"))
    found = []
    for entry in manifest.loras:
        named = [Path(text) for text in places.loras if Path(text).name == entry["file"]]
        candidates = [path for path in (*named, *shipped) if path.name == entry["file"]]
        right = next((path for path in candidates if read_lora(path).digest == entry["digest"]), None)
        if right is None:
            what = "has another digest" if candidates else "is not found"
            raise OptionError(
                f"{bundle.name} has the LoRA {entry['file']}, sha256 {entry['digest'][:8]}…, which {what}: "
                "say where it is with --lora FILE"
            )
        found.append((str(right), float(entry["scale"])))
    return found


def plan_of(bundle: Path, steps: int | None) -> PlanEntry:
    """The bundle's plan for so many steps, its first one for None; `OptionError` names those that there are."""
    plans: PlanFile = Folder(bundle).plans()
    try:
        return plans.for_steps(steps)
    except PlanError as error:
        raise OptionError(f"{bundle.name}: {error}") from None


def latent_size(manifest: Manifest) -> tuple[int, int] | None:
    """(height, width) of a bundle's latents, None for a manifest that does not say."""
    shapes = manifest.options.get("shapes")
    return None if shapes is None else (int(shapes["latent_height"]), int(shapes["latent_width"]))


def torch_parts(bundle: Path, source: Source, *, precision: str = "fp32", device: str = "cpu") -> "Parts":
    """The pipeline of a bundle in torch, with its LoRAs fused, at the bundle's size and with its tokenizer."""
    import torch
    from transformers import CLIPTokenizer

    from benchmarks.sampling import Parts

    dtype = getattr(torch, DTYPES[precision])
    unet, vae, text_encoder = (source.load(name, dtype)[0].to(device) for name in ("unet", "vae", "text_encoder"))
    tokenizer = CLIPTokenizer.from_pretrained(bundle / "tokenizer")
    return Parts(unet, vae, text_encoder, tokenizer, latents=latent_size(read_manifest(bundle)))


def teacher_plan(source: Source, *, steps: int, guidance: float | None) -> FewStepPlan:
    """The base as it was before distillation: DDIM with the base's own noise schedule and spacing.

    guidance: None is the built-in model's own, and 7.5 for every other base.
    """
    from hypersd_export import builtin

    if guidance is None:
        guidance = float(builtin.card()["guidance"]) if source.base.name == BUILTIN else 7.5
    return plan_from_scheduler_config(
        source.base.scheduler_config, num_steps=steps, guidance=Guidance.of(guidance), solver=Solver.DDIM
    )


def weights_mb(source: Source) -> float:
    """The files that base and LoRAs are read from, in MB."""
    files = {path for part in source.base.parts.values() for path in part.files}
    return sum(path.stat().st_size for path in (*files, *(lora.path for lora, _ in source.loras))) / 1e6
