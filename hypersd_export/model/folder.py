"""Pipeline folders in diffusers' format: which files each component consists of, checked before anything is loaded."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hypersd_export.errors import ModelError
from hypersd_export.model.files import check_weights, convert_hint, read_json
from hypersd_export.model.parts import Part, classes_of

STEMS = dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model") | dict.fromkeys(
    ("text_encoder", "text_encoder_2"), "model"
)
PICKLES = dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model.bin") | dict.fromkeys(
    ("text_encoder", "text_encoder_2"), "pytorch_model.bin"
)


def read_model_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a pipeline folder; ModelError says what the folder is instead."""
    index = folder / "model_index.json"
    if index.is_file():
        content = read_json(index)
        if not isinstance(content.get("_class_name"), str):
            raise ModelError(f"{index}: has no _class_name, so it does not say what pipeline it is; use another folder")
        return content
    if (folder / "config.json").is_file():
        raise ModelError(f"{folder}: one component, not a pipeline; pass it as --unet or --vae beside a --base")
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    if files:
        raise ModelError(f"{folder}: no model_index.json, but {files[0]}; pass that file if it is a checkpoint")
    raise ModelError(f"{folder}: not a pipeline folder (no model_index.json); pass a diffusers folder or a checkpoint")


def folder_parts(
    folder: Path, index: dict[str, Any], names: Iterable[str], *, variant: str | None, allow_pickle: bool
) -> dict[str, Part]:
    """The components of these names of a pipeline folder."""
    parts = {}
    for name in names:
        wanted, entry = classes_of(name), index.get(name)
        stated = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if stated not in wanted:
            raise ModelError(f"{folder}: its {name} is {stated}, where {wanted[0]} is needed; pass another pipeline")
        parts[name] = component(folder / name, name, variant=variant, allow_pickle=allow_pickle)
    return parts


def component(folder: Path, name: str, *, variant: str | None, allow_pickle: bool) -> Part:
    """One component folder (config.json beside its weights) as a part; its files are whole safetensors."""
    config_file = folder / "config.json"
    config = read_json(config_file)
    stated = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    wanted = classes_of(name)
    if stated is not None and stated not in wanted:
        raise ModelError(f"{config_file}: a {stated}, where {wanted[0]} is needed; pass another {name}")
    files = locate_weights(folder, name, variant=variant, allow_pickle=allow_pickle)
    for path in files:
        check_weights(path, allow_pickle=allow_pickle)
    return Part(name=name, config=config, files=files, config_file=config_file)


def locate_weights(folder: Path, name: str, *, variant: str | None, allow_pickle: bool) -> tuple[Path, ...]:
    """The weight files of a component folder: one, or the shards of an index; never another variant than asked."""
    stem, middle = STEMS[name], f".{variant}" if variant else ""
    single = folder / f"{stem}{middle}.safetensors"
    if single.is_file():
        return (single,)
    for index in (f"{stem}.safetensors.index{middle}.json", f"{stem}{middle}.safetensors.index.json"):
        if (folder / index).is_file():
            weight_map = read_json(folder / index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ModelError(f"{folder / index}: has no weight_map; download it again")
            return tuple(folder / shard for shard in sorted(set(weight_map.values())))
    pickle_stem, _, suffix = PICKLES[name].partition(".")
    pickle = folder / f"{pickle_stem}{middle}.{suffix}"
    if pickle.is_file():
        if allow_pickle:
            return (pickle,)
        target = pickle.with_name(f"{stem}{middle}.safetensors")
        raise ModelError(f"{pickle}: a pickle, which can run code when it is read; {convert_hint(pickle, target)}")
    there = sorted(p.name for p in folder.glob(f"{stem}*.safetensors"))
    if variant:
        raise ModelError(
            f"{folder}: no variant {variant!r} (there is: {', '.join(there) or 'no safetensors'}); "
            "drop --variant or name another"
        )
    others = [name.removeprefix(f"{stem}.").removesuffix(".safetensors") for name in there]
    if others:
        raise ModelError(f"{folder}: only variants are there ({', '.join(others)}); pass --variant {others[0]}")
    raise ModelError(f"{folder}: no weights ({single.name} is missing); download the folder again")
