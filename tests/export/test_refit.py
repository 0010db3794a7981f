"""`hypersd-export refit`: the same bundle with another LoRA, equal to a fresh export; engines refitted on a GPU."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from hypersd_export.bundle.digest import sha256_file
from hypersd_export.bundle.engines import read_header, why_unusable
from hypersd_export.bundle.manifest import read_manifest, write_manifest
from hypersd_export.errors import BuildError, BundleError, OptionError
from hypersd_export.export import export
from hypersd_export.refit import refit_spec
from hypersd_export.spec import EngineFlags, PlanFlags
from hypersd_export.targets import Target, tensorrt, tensorrt_vendor, tensorrt_worker
from hypersd_export.targets.tensorrt import EngineOptions, build, onnx_digest, refit
from hypersd_export.targets.tensorrt_vendor import Vendor
from tests.export.tensorrt_graphs import small_net

rtx = pytest.mark.skipif(not tensorrt_vendor.installed("rtx"), reason="tensorrt_rtx is not installed")


def edited(bundle, out, **changes):
    """A bundle that holds nothing but a manifest, some of it changed."""
    out.mkdir()
    manifest = read_manifest(bundle).to_json() | changes
    write_manifest(out, **{key: value for key, value in manifest.items() if key not in ("format", "files")})
    return out


def test_it_is_a_fresh_export_with_the_other_lora(
    exported, lora_exported, lora_file, tiny_base, export_cache, tmp_path
):
    """The bundle with the LoRA at 0.8, refitted to 0.3: every file but for time stamps is a fresh export's."""
    weaker = f"{lora_file}:0.3"
    spec = refit_spec(lora_exported.path, [weaker], tmp_path / "a", base=str(tiny_base), cache_dir=export_cache)
    assert (spec.batch, spec.size, spec.plan, spec.targets) == (2, (24, 16), PlanFlags(), (Target.ONNX,))
    assert spec.precision is None
    refitted = export(replace(spec, verify=False))
    fresh = export(replace(spec, refit_from=None, verify=False, out=tmp_path / "b"))
    files = {path.relative_to(refitted.path).as_posix() for path in refitted.path.rglob("*") if path.is_file()}
    same = files - {"manifest.json", "README.md"}
    assert "unet/model.onnx" in same
    for name in same:
        assert sha256_file(refitted.path / name) == sha256_file(fresh.path / name), name
    unet = [sha256_file(done.path / "unet/model.onnx") for done in (exported, lora_exported, refitted)]
    assert len(set(unet)) == 3
    assert [lora["scale"] for lora in refitted.manifest.loras] == [0.3]
    assert refitted.manifest.options["refit_from"] == lora_exported.path.name
    cached = {stage.name: stage.cached for stage in refitted.stages}
    assert (cached["onnx-vae_decoder"], cached["onnx-unet"]) == (True, False)


def test_what_cannot_be_refitted(exported, lora_exported, lora_file, export_cache, tmp_path):
    with pytest.raises(OptionError, match=r"refit: name the LoRA with --lora"):
        refit_spec(exported.path, [], tmp_path / "out")
    with pytest.raises(BundleError, match="does not say how it was made"):
        refit_spec(edited(exported.path, tmp_path / "old", options={}), ["x"], tmp_path / "out")
    moved = edited(exported.path, tmp_path / "moved", base={**exported.manifest.base, "digest": "0" * 64})
    spec = refit_spec(moved, [str(lora_file)], tmp_path / "out", base=str(export_cache / "none"))
    assert spec.base == str(export_cache / "none")
    engines = {"tensorrt": {"weights": "full"}}
    full = edited(exported.path, tmp_path / "full", targets=engines)
    with pytest.raises(OptionError, match="these engines hold weights that cannot be changed"):
        refit_spec(full, ["x"], tmp_path / "out")


def test_another_base_is_refused(exported, lora_file, tiny_base, tmp_path):
    moved = edited(exported.path, tmp_path / "moved", base={**exported.manifest.base, "digest": "0" * 64})
    spec = refit_spec(moved, [str(lora_file)], tmp_path / "out", base=str(tiny_base))
    with pytest.raises(BundleError, match=r"was made from .* of sha256 00000000…, and this one has .*--base") as error:
        export(replace(spec, plan=PlanFlags()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_options_come_back_as_they_were_said(exported, precision, tmp_path):
    """Of engines too: their library, their GPUs, their weights."""
    record = {"options": {"optimization_level": 5}}
    target = {"weights": "refit", "flavour": "classic", "capabilities": ["9.0"], "engines": {"unet": record}}
    options = exported.manifest.options | {"precision": {"onnx": precision, "tensorrt": "fp16"}}
    targets = {"onnx": {"precision": precision}, "tensorrt": target}
    spec = refit_spec(edited(exported.path, tmp_path / "b", options=options, targets=targets), ["x:1"], tmp_path / "o")
    assert spec.engines == EngineFlags(flavour="classic", capabilities=("9.0",), weights="refit", level=5)
    assert {target: spec.precision_of(target) for target in spec.targets} == {"onnx": precision, "tensorrt": "fp16"}
    assert spec.plan == PlanFlags(steps=(2, 4), scheduler="ddim", guidance=1.0)


# The engines


class FakeLibrary:
    """What `Vendor.refitted` calls of the library: `says` is what each step answers, `done` what was called."""

    ILogger = SerializationFlag = None

    def __init__(self, loads=True, takes=True, missing=(), refits=True):
        self.done = []
        self.SerializationFlag = SimpleNamespace(INCLUDE_REFIT="include", EXCLUDE_WEIGHTS="exclude")
        form = SimpleNamespace(
            set_flag=lambda flag: self.done.append(f"set {flag}"),
            clear_flag=lambda flag: self.done.append(f"clear {flag}"),
        )

        def written(given):
            assert given is form
            return b"written"

        engine = SimpleNamespace(create_serialization_config=lambda: form, serialize_with_config=written)

        def load(data):
            self.done.append(bytes(data))
            return engine if loads else None

        def read(path):
            self.done.append(path)
            return takes

        def apply():
            self.done.append("refit")
            return refits

        refitter = SimpleNamespace(get_missing_weights=lambda: list(missing), refit_cuda_engine=apply)
        self.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=load)
        self.Refitter = lambda given, logger: refitter if given is engine else None
        self.OnnxParserRefitter = lambda given, logger: SimpleNamespace(refit_from_file=read if given else None)


def vendor_of(**says):
    library = FakeLibrary(**says)
    return Vendor(flavour="rtx", trt=library, logger=None, errors=["first", "the\nlast one"]), library


def test_the_library_is_asked_in_order(tmp_path):
    (tmp_path / "e.engine").write_bytes(b"engine")
    vendor, library = vendor_of()
    assert vendor.refitted(tmp_path / "e.engine", tmp_path / "m.onnx") == b"written"
    assert library.done == [b"engine", str(tmp_path / "m.onnx"), "refit", "set include", "clear exclude"]


@pytest.mark.parametrize(
    ("says", "line"),
    [
        ({"loads": False}, "e.engine does not load: the last one; export it again"),
        ({"takes": False}, "e.engine does not take the weights of m.onnx: the last one; export it again"),
        ({"missing": ("a", "b")}, "does not take the weights of m.onnx: 2 weights are missing, 'a' first"),
        ({"refits": False}, "e.engine was not refitted: the last one"),
    ],
)
def test_a_library_that_refuses(says, line, tmp_path):
    (tmp_path / "e.engine").write_bytes(b"engine")
    vendor, _ = vendor_of(**says)
    with pytest.raises(BuildError) as error:
        vendor.refitted(tmp_path / "e.engine", tmp_path / "m.onnx")
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Two engines of one graph with different weights, each with its record, file and ONNX."""
    made = []
    for island in (False, True):
        folder = tmp_path_factory.mktemp("engine")
        onnx = small_net(folder / "m.onnx", batch=1, external=island)
        options = EngineOptions(flavour="rtx", capabilities=("8.6", "8.9"))
        record = build(onnx, folder, component="unet", options=options)
        made.append((record, folder / Path(record.file).name, onnx))
    return made


@pytest.fixture
def gpu(monkeypatch, engines):
    """A GPU of 8.9, and a worker in this process whose library writes the second engine's bytes."""
    asked = []

    def run_worker(module, request, report, **_):
        assert module == tensorrt.WORKER
        assert tensorrt_worker.main([str(request)]) == 0
        return json.loads(report.read_text())

    def refitted(engine, onnx):
        asked.append((engine, onnx))
        return engines[1][1].read_bytes()

    version = engines[1][0].version
    monkeypatch.setattr(tensorrt_vendor, "gpu_capability", lambda: (8, 9))
    monkeypatch.setattr(tensorrt, "run_worker", run_worker)
    monkeypatch.setattr(
        tensorrt_worker, "Vendor",
        SimpleNamespace(open=lambda flavour: SimpleNamespace(refitted=refitted, version=version)),
    )  # fmt: skip
    return asked


@rtx
def test_a_refitted_engine_is_named_and_recorded_as_what_it_is(engines, gpu, tmp_path):
    (old, path, _), (_, _, onnx) = engines
    old = replace(old, weights="stripped", options={**old.options, "weights": "stripped"})
    stripped = tmp_path / Path(old.file).with_suffix("").with_suffix(f".{old.digest[:8]}.engine").name
    stripped.write_bytes(path.read_bytes())
    old = replace(old, file=f"unet/{stripped.name}")
    out = tmp_path / "out"
    out.mkdir()
    new = refit(old, stripped, onnx, out)
    made = out / Path(new.file).name
    assert gpu == [(stripped.resolve(), onnx.resolve())]
    assert [one.name for one in out.iterdir()] == [made.name]
    assert (new.weights, new.options["weights"]) == ("refit", "refit")
    assert new.onnx_sha256 == onnx_digest(onnx)
    assert new.digest != old.digest
    assert (
        why_unusable(new, made, flavour="rtx", capability=(8, 9), onnx_sha256=onnx_digest(onnx), contents=True) is None
    )
    assert (new.inputs, new.outputs, new.layers) == (old.inputs, old.outputs, old.layers)
    assert read_header(made).bytes == new.bytes == made.stat().st_size


@rtx
def test_engines_that_are_not_refitted(engines, gpu, tmp_path, monkeypatch):
    (old, path, _), (_, _, onnx) = engines
    with pytest.raises(BundleError, match="computes other ops in float32 than these weights need"):
        refit(old, path, onnx, tmp_path, fp32_nodes=["conv"])
    monkeypatch.setattr(tensorrt_vendor, "gpu_capability", lambda: (12, 0))
    with pytest.raises(BundleError, match=r"and this GPU has 12\.0"):
        refit(old, path, onnx, tmp_path)
    monkeypatch.setattr(tensorrt_vendor, "gpu_capability", lambda: None)
    with pytest.raises(OptionError, match="refitted on the GPU that runs them, and no driver and GPU are found here"):
        refit(old, path, onnx, tmp_path)
    assert gpu == []
    assert not list(tmp_path.iterdir())


@rtx
def test_a_stripped_bundle_holds_weights_once_it_is_refitted(tiny_spec, lora_file, tmp_path, monkeypatch):
    """The whole of it but the library's own part: which engines are asked for, and what the manifest says after."""
    flags = EngineFlags(flavour="rtx", capabilities=("8.6", "8.9"))
    trt = replace(tiny_spec, targets=(Target.TENSORRT,), engines=flags, verify=False, golden=False, scan=False)
    first = export(replace(trt, out=tmp_path / "first"))
    target = first.manifest.targets["tensorrt"]
    said = {name: {**engine, "weights": "stripped"} for name, engine in target["engines"].items()}
    manifest = first.manifest.to_json() | {"targets": {"tensorrt": {**target, "weights": "stripped", "engines": said}}}
    write_manifest(first.path, **{key: value for key, value in manifest.items() if key not in ("format", "files")})
    asked = []

    def refitted(record, engine, onnx, folder, **_):
        asked.append((record.component, record.weights, engine.parent.parent))
        path = folder / Path(record.file).name
        path.write_bytes(engine.read_bytes())
        return replace(record, weights="refit")

    monkeypatch.setattr(tensorrt_vendor, "gpu_capability", lambda: (8, 9))
    monkeypatch.setattr(tensorrt, "refit", refitted)
    spec = refit_spec(first.path, [str(lora_file)], tmp_path / "b", base=trt.base, cache_dir=tmp_path / "cache")
    again = export(spec).manifest.targets["tensorrt"]
    names = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert asked == [(name, "stripped", first.path.resolve()) for name in names]
    assert again["weights"] == "refit"
    assert {engine["weights"] for engine in again["engines"].values()} == {"refit"}
