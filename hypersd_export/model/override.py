"""Another UNet or VAE in the place of the base's (`--unet`, `--vae`): found and checked as the base's own."""

from dataclasses import replace
from pathlib import Path

from hypersd_export.errors import ModelError
from hypersd_export.model import hub
from hypersd_export.model.files import check_weights, exists, read_json, user_path
from hypersd_export.model.folder import component
from hypersd_export.model.parts import Layout, Part, classes_of, shapes_of
from hypersd_export.model.single_file import UNET_PREFIX, VAE_PREFIX, ldm_unet, ldm_vae

KINDS = {"unet": "UNet", "vae": "VAE"}


def override_part(name: str, text: str, base: Part, *, variant: str | None, allow_pickle: bool) -> Part:
    """Another UNet or VAE: a component folder, a pipeline folder that has one, a file, or a hub id."""
    path = user_path(text)
    if exists(path) and path.is_file():
        return _file(name, path, base, allow_pickle=allow_pickle)
    if not exists(path) and hub.looks_like_hub_id(text):
        path = hub.fetch_component(text, None, name, variant=variant, allow_pickle=allow_pickle, subfolder=False)
        if not (path / "config.json").is_file():
            path = hub.fetch_component(text, None, name, variant=variant, allow_pickle=allow_pickle)
    if not exists(path) or not path.is_dir():
        raise ModelError(
            f"--{name} {text}: no such file or folder; pass a component folder, a .safetensors or a hub id"
        )
    folder = path / name if (path / name / "config.json").is_file() else path
    if not (folder / "config.json").is_file():
        raise ModelError(f"--{name} {text}: has neither config.json nor {name}/config.json; pass a component folder")
    return component(folder, name, variant=variant, allow_pickle=allow_pickle)


def _file(name: str, path: Path, base: Part, *, allow_pickle: bool) -> Part:
    check_weights(path, allow_pickle=allow_pickle)
    shapes = shapes_of(path)
    prefix, build = (UNET_PREFIX, ldm_unet) if name == "unet" else (VAE_PREFIX, ldm_vae)
    marker = "input_blocks.0.0.weight" if name == "unet" else "encoder.down.0.block.0.conv2.weight"
    for start in (prefix, ""):
        if f"{start}{marker}" in shapes:
            found = build(path, shapes, start)
            if name == "vae":  # of the same latents as the base's, whatever shapes cannot tell
                kept = {key: base.config[key] for key in ("scaling_factor", "force_upcast") if key in base.config}
                found = replace(found, config={**found.config, **kept})
            return found
    if any("lora" in key for key in shapes):
        raise ModelError(f"--{name} {path}: a LoRA, not a {KINDS[name]}; pass it as --lora {path.name}")
    if not any(".resnets." in key for key in shapes):
        raise ModelError(f"--{name} {path}: not a {KINDS[name]} (first tensor {next(iter(shapes), 'none')})")
    beside = path.parent / "config.json"
    if beside.is_file() and read_json(beside).get("_class_name") in classes_of(name):
        return Part(name=name, config=read_json(beside), files=(path,), config_file=beside)
    return replace(base, files=(path,), layout=Layout.diffusers, prefix="")
