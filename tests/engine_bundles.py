"""Bundles of engines for the device of `tests/fake_device.py`: as TensorRT's, down to header, name and record."""

import json
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypersd_export.bundle.digest import sha256_file
from hypersd_export.bundle.engines import PIPELINE, EngineRecord, EngineTensor, engine_digest, engine_name
from hypersd_export.bundle.manifest import FILE_NAME, read_manifest, write_manifest
from hypersd_export.diffusion.planfile import PlanFile
from hypersd_export.graphs.spec import Component, Shapes
from tests.bundles import CHANNELS, HEIGHT, SCALING, TOKENS, WIDTH, make_bundle
from tests.fake_device import FakeDevice, engine_of

VERSION = "1.7.1.116"
COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
_BITS = {"8.6": 4, "8.9": 8, "12.0": 16}


def rtx_engine(onnx: Path, *, version: str = VERSION, capabilities: Sequence[str] = ("8.6", "8.9")) -> bytes:
    """An engine file with a true header; what follows is for the fake device."""
    payload = engine_of(onnx)
    size = struct.calcsize("<4s12xQ4B4sQ")
    numbers = [int(part) for part in version.split(".")]
    bits = sum(_BITS[capability] for capability in capabilities)
    return struct.pack("<4s12xQ4B4sQ", b"vtrt", size + len(payload), *numbers, b"vtrt", bits) + payload


def write_engine(
    bundle: Path, component: str, onnx: Path, *, flavour: str = "rtx", version: str = VERSION,
    capabilities: Sequence[str] = ("8.6", "8.9"),
) -> EngineRecord:  # fmt: skip
    """Write an engine of this ONNX file into the bundle; its record."""
    options: dict[str, Any] = {"weights": "full"}
    source = sha256_file(onnx)
    digest = engine_digest(
        onnx_sha256=source, flavour=flavour, version=version, capabilities=capabilities, options=options
    )
    name = engine_name(
        component, flavour=flavour, version=version, capabilities=capabilities, precision="fp16", tag="static",
        digest=digest,
    )  # fmt: skip
    file = name if component == PIPELINE else f"{component}/{name}"
    data = engine_of(onnx) if flavour == "classic" else rtx_engine(onnx, version=version, capabilities=capabilities)
    (bundle / file).parent.mkdir(parents=True, exist_ok=True)
    (bundle / file).write_bytes(data)
    tensors: tuple[Any, ...] = FakeDevice().load(bundle / file, None).tensors
    sides: dict[bool, list[EngineTensor]] = {True: [], False: []}
    for t in tensors:
        sides[t.is_input].append(
            EngineTensor(name=t.name, shape=t.shape, dtype=t.dtype.name, least=t.least, most=t.most)
        )
    return EngineRecord(
        component=component, file=file, flavour=flavour, version=version, capabilities=tuple(capabilities),
        precision="fp16", weights="full", inputs=tuple(sides[True]), outputs=tuple(sides[False]), options=options,
        onnx_sha256=source, sha256=sha256_file(bundle / file), bytes=len(data), seconds=1.0, peak_mb=1.0, layers={},
    )  # fmt: skip


def reseal(bundle: Path, records: Mapping[str, EngineRecord], targets: Mapping[str, Any] | None = None) -> Path:
    """Write the manifest of what is in the folder now, with these engines as its first target."""
    old = read_manifest(bundle)
    (bundle / FILE_NAME).unlink()
    engines = {"precision": "fp16", "engines": {name: record.to_json() for name, record in records.items()}}
    write_manifest(
        bundle, hypersd="0.0.0", base=old.base, loras=old.loras, targets={"tensorrt": engines, **(targets or {})},
        options=old.options, versions=old.versions, stages=old.stages, parity=old.parity,
    )  # fmt: skip
    return bundle


def make_engine_bundle(folder: Path, *bundle_options: Any, **options: Any) -> tuple[Path, dict[str, EngineRecord]]:
    """`make_bundle` in `folder`/onnx, and in `folder`/bundle the same with engines in place of the ONNX graphs.

    Options `flavour`, `version` and `capabilities` are of the engines, all others `make_bundle`'s.
    """
    mine = {name: options.pop(name) for name in ("flavour", "version", "capabilities") if name in options}
    onnx = make_bundle(folder / "onnx", *bundle_options, **options)
    bundle = folder / "bundle"
    shutil.copytree(onnx, bundle, ignore=shutil.ignore_patterns("model.onnx"))
    records = {name: write_engine(bundle, name, onnx / name / "model.onnx", **mine) for name in COMPONENTS}
    return reseal(bundle, records), records


def make_single_engine_bundle(folder: Path, *bundle_options: Any, batch: int = 1) -> tuple[Path, Path]:
    """The bundle of one pipeline engine, and the ONNX bundle of the same single graph."""
    from hypersd_export.targets.onnx_pipeline import Wiring, compose

    parts = make_bundle(folder / "parts", *bundle_options, batch=batch)
    plans = PlanFile.from_json(json.loads((parts / "plan.json").read_text()))
    plans = replace(plans, entries=plans.entries[:1])
    entry = plans.default
    cfg = 2 if entry.plan.guidance.kind == "cfg" else 1
    shapes = Shapes(batch=batch, unet_batch=batch * cfg, channels=CHANNELS, latent_height=HEIGHT, latent_width=WIDTH,
                    vae_scale=2, tokens=TOKENS, text_width=CHANNELS)  # fmt: skip
    wiring = Wiring(table=entry.table, guidance=entry.plan.guidance, shapes=shapes, scaling_factor=SCALING)
    (parts / "plan.json").write_text(json.dumps(plans.to_json()))
    onnx, bundle = folder / "onnx", folder / "bundle"
    for copy in (onnx, bundle):
        shutil.copytree(parts, copy, ignore=shutil.ignore_patterns("model.onnx"))
    graphs = {Component(name): parts / name / "model.onnx" for name in COMPONENTS[:3]}
    compose(graphs, wiring, onnx)
    record = write_engine(bundle, PIPELINE, onnx / "pipeline.onnx")
    return reseal(bundle, {PIPELINE: record}), _resealed_onnx(onnx)


def _resealed_onnx(bundle: Path) -> Path:
    from tests.bundles import seal

    (bundle / FILE_NAME).unlink()
    return seal(bundle)
