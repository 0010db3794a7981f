"""What stands in a bundle beside the graphs: tokenizer, scheduler, model_index.json, plan.json, card, licences."""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hypersd_export import __version__
from hypersd_export.bundle.card import model_card
from hypersd_export.bundle.manifest import Manifest
from hypersd_export.diffusion.diffusers_call import diffusers_scheduler
from hypersd_export.graphs.spec import Component
from hypersd_export.job import Job
from hypersd_export.plan_choice import describe
from hypersd_export.spec import BUILTIN
from hypersd_export.targets.onnx_pipeline import PIPELINE_DATA_FILE, PIPELINE_FILE

COMPONENT_FILES = ("model.onnx", "model.onnx_data", "config.json")
SINGLE_FILES = (PIPELINE_FILE, PIPELINE_DATA_FILE)


def assemble(job: Job, components: Mapping[Component, Path], bundle: Path, *, single: Path | None = None) -> None:
    """Write all but golden/, the card and the manifest into the empty folder `bundle`.

    `single` is the folder of the single graph, which then stands in place of the components' own: of them the
    configurations alone are kept, and no model_index.json, as no other pipeline can load this.
    """
    for component, folder in components.items():
        names = COMPONENT_FILES if single is None else ("config.json",)
        _copy(folder, names, bundle / component)
    if single is not None:
        _copy(single, SINGLE_FILES, bundle)
    call = diffusers_scheduler(job.plans.default.plan)
    job.source.base.write_tokenizer(bundle / "tokenizer")
    if single is None:
        index = job.source.base.model_index()
        index["scheduler"] = ["diffusers", call.class_name]
        _write_json(bundle / "model_index.json", index)
    (bundle / "scheduler").mkdir()
    _write_json(bundle / "scheduler" / "scheduler_config.json", call.config)
    _write_json(bundle / "plan.json", job.plans.to_json())
    (bundle / "LICENSES").write_text(licenses(job), encoding="utf-8")


def _copy(folder: Path, names: Iterable[str], to: Path) -> None:
    """Those of these files that there are."""
    to.mkdir(exist_ok=True)
    for name in names:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, to / name)


def licenses(job: Job) -> str:
    """The licences of the weights, as far as their sources say."""
    lines = [f"Base {job.source.base.name}: {job.source.base.license_note}"]
    lines += [
        f"LoRA {lora.path.name}: {lora.metadata.get('license', 'not stated in the file')}"
        for lora, _ in job.source.loras
    ]
    text = "\n".join(lines) + "\n"
    if job.spec.base == BUILTIN:
        from hypersd_export import builtin

        attribution = builtin.model_dir().parent / "ATTRIBUTION.md"
        if attribution.is_file():
            text += "\n" + attribution.read_text(encoding="utf-8")
    return text


def write_card(
    job: Job, bundle: Path, targets: Mapping[str, Any], parity: Mapping[str, Any] | str, created: str
) -> None:
    """Write README.md."""
    plan = job.plans.default.plan
    call = diffusers_scheduler(plan)
    base = job.source.base
    facts = {
        "title": f"{base.name}, {describe(plan)}",
        "summary": "A text-to-image pipeline with its schedule inside, exported to ONNX by hypersd-export.",
        "base": {"name": base.name, "family": str(base.family), "digest": base.digest, "hub_id": _hub_id(job)},
        "loras": job.lora_records(),
        "width": job.shapes.width,
        "height": job.shapes.height,
        "batch": job.shapes.batch,
        "targets": {name: {key: target[key] for key in ("precision", "opset")} for name, target in targets.items()},
        "entries": job.plans.to_json()["entries"],
        "scheduler": call.class_name,
        "call": ", ".join(f"{name}={value!r}" for name, value in call.call.items()),
        "exact": call.exact,
        "single_graph": targets["onnx"].get("single_graph", {}).get("inputs"),
        "parity": parity,
        "prompt": job.prompt,
        "license": base.license_note if re.fullmatch(r"[A-Za-z0-9.+-]+", base.license_note) else None,
        "license_note": f"Base: {base.license_note}. See LICENSES.",
        "hypersd": __version__,
        "created": created,
    }
    (bundle / "README.md").write_text(model_card(facts), encoding="utf-8")


def _hub_id(job: Job) -> str | None:
    """The base's id on the hub, if that is where it came from."""
    base = job.spec.base
    return None if base == BUILTIN or Path(base).expanduser().exists() else base


def summary(manifest: Manifest) -> dict[str, Any]:
    """What `inspect` prints of a manifest: everything but the digests of the files, which become their total."""
    data = manifest.to_json()
    files = data.pop("files")
    data["files"] = {"count": len(files), "bytes": sum(entry["bytes"] for entry in files.values())}
    return data


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
