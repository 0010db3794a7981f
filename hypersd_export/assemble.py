"""What stands in a bundle beside the graphs: tokenizer, scheduler, model_index.json, plan.json, card, licences."""

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hypersd_export import __version__
from hypersd_export.build import Built
from hypersd_export.bundle.card import model_card
from hypersd_export.bundle.manifest import Manifest
from hypersd_export.diffusion.diffusers_call import diffusers_scheduler
from hypersd_export.graphs.spec import Component
from hypersd_export.job import Job
from hypersd_export.plan_choice import describe
from hypersd_export.spec import BUILTIN
from hypersd_export.targets import Target
from hypersd_export.targets.onnx import MODEL_FILE

TARGET_NAMES = {Target.ONNX: "ONNX", Target.TENSORRT: "TensorRT", Target.COREML: "Core ML"}


def assemble(
    job: Job, built: Sequence[Built], bundle: Path, delivered: Mapping[str, Path] = MappingProxyType({})
) -> None:
    """Write all but golden/, the card and the manifest into the folder `bundle`, which is empty but for what was
    `delivered`: by name, which file each is a copy of.

    model_index.json is for other pipelines of the ONNX graphs, so that it is there only if those are.
    """
    for each in built:
        for name, source in each.files.items():
            if delivered.get(name) != source:
                _copy(source, bundle / name)
    call = diffusers_scheduler(job.plans.default.plan)
    job.source.base.write_tokenizers(bundle)
    if (bundle / Component.UNET / MODEL_FILE).is_file():
        index = job.source.base.model_index()
        index["scheduler"] = ["diffusers", call.class_name]
        _write_json(bundle / "model_index.json", index)
    (bundle / "scheduler").mkdir()
    _write_json(bundle / "scheduler" / "scheduler_config.json", call.config)
    _write_json(bundle / "plan.json", job.plans.to_json())
    (bundle / "LICENSES").write_text(licenses(job), encoding="utf-8")


def _copy(source: Path, to: Path) -> None:
    """A file or a folder."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, to)
    else:
        shutil.copyfile(source, to)


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
        "summary": "A text-to-image pipeline with its schedule inside, exported to "
        f"{_listed(targets)} by hypersd-export.",
        "base": {"name": base.name, "family": str(base.family), "digest": base.digest, "hub_id": _hub_id(job)},
        "loras": job.lora_records(),
        "width": job.shapes.width,
        "height": job.shapes.height,
        "batch": job.shapes.batch,
        "span": None if job.span is None else job.span.to_json(),
        "targets": {name: {**target, "fp32_nodes": fp32_nodes(target)} for name, target in targets.items()},
        "scanned": job.spec.scan,
        "entries": job.plans.to_json()["entries"],
        "scheduler": call.class_name,
        "call": ", ".join(f"{name}={value!r}" for name, value in call.call.items()),
        "exact": call.exact,
        "single_graph": targets.get("onnx", {}).get("single_graph", {}).get("inputs"),
        "parity": parity,
        "prompt": job.prompt,
        "license": base.license_note if re.fullmatch(r"[A-Za-z0-9.+-]+", base.license_note) else None,
        "license_note": f"Base: {base.license_note}. See LICENSES.",
        "hypersd": __version__,
        "created": created,
    }
    (bundle / "README.md").write_text(model_card(facts), encoding="utf-8")


def fp32_nodes(target: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """By component, the nodes of a target's ONNX graphs (or of those that it was made from) that stay in float32."""
    components = target.get("onnx", target).get("components", {})
    return {name: figures.get("fp32_nodes", ()) for name, figures in components.items()}


def _listed(targets: Iterable[str]) -> str:
    """The targets as they are written: ONNX, TensorRT and Core ML."""
    names = [TARGET_NAMES[Target(target)] for target in targets]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


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
