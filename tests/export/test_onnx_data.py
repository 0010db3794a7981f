"""targets/onnx_data.py: weights beside the graph, for the cache and for the bundle at once."""

import errno
import hashlib
import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
import pytest

from hypersd_export import assemble, build
from hypersd_export.bundle.cache import StageCache
from hypersd_export.errors import DestinationError
from hypersd_export.export import export
from hypersd_export.graphs.spec import Component
from hypersd_export.targets import onnx as target
from hypersd_export.targets import onnx_data, onnx_fp16
from hypersd_export.targets.onnx import DATA_FILE, DIGEST, MODEL_FILE
from hypersd_export.verify.range_scan import KeptOp, Ranges

ARRAYS = {
    "matrix": np.arange(3000, dtype=np.float32).reshape(60, 50),
    "small": np.arange(8, dtype=np.float32),
    "transposed": np.arange(3000, dtype=np.float16).reshape(60, 50).T,
    "brain": np.arange(2000).astype(ml_dtypes.bfloat16),
    "nibbles": (np.arange(4001) % 16 - 8).astype(ml_dtypes.int4),
}


@pytest.fixture
def model() -> onnx_ir.Model:
    """A model of initialisers of several kinds, each an output."""
    graph = onnx_ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="weights")
    for name, array in ARRAYS.items():
        value = target.add_initializer(graph, name, onnx_ir.tensor(array, name=name))
        node = onnx_ir.node("Identity", [value])
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"{name}.out", value.type, value.shape
        graph.append(node)
        graph.outputs.append(node.outputs[0])
    return onnx_ir.Model(graph, ir_version=10)


def test_onnx_reads_what_was_written_and_its_digest_is_the_files(model, tmp_path):
    twin = tmp_path / "bundle" / "unet" / DATA_FILE
    digest = target.save(model, tmp_path, external=True, also=[twin])
    data = (tmp_path / DATA_FILE).read_bytes()
    assert digest == hashlib.sha256(data).hexdigest()
    assert twin.read_bytes() == data
    assert len(data) == 12_000 + 6_000 + 4_000 + 2_001
    read = onnx.load(tmp_path / MODEL_FILE)
    for initializer in read.graph.initializer:
        found = onnx.numpy_helper.to_array(initializer)
        assert found.astype(np.float32).tobytes() == ARRAYS[initializer.name].astype(np.float32).tobytes()
    assert [each.name for each in read.graph.initializer] == list(ARRAYS)


def test_the_file_is_onnx_irs_own(model, tmp_path):
    target.save(model, tmp_path, external=True)
    onnx_ir.save(model, tmp_path / "theirs.onnx", external_data="theirs.data", size_threshold_bytes=1024)
    assert (tmp_path / DATA_FILE).read_bytes() == (tmp_path / "theirs.data").read_bytes()


def test_afterwards_the_model_has_its_weights_in_memory(model, tmp_path):
    before = [value.const_value for value in model.graph.initializers.values()]
    with pytest.raises(OSError, match="full"), onnx_data.weights_in(
        model, tmp_path / "w", also=[], told=lambda _: None
    ):  # fmt: skip
        raise OSError("full")
    assert [value.const_value for value in model.graph.initializers.values()] == before


def test_each_weight_is_told_of_before_it_is_read(model, tmp_path):
    told = []
    with onnx_data.weights_in(model, tmp_path / "w", also=[], told=lambda tensor: told.append(tensor.name)):
        assert isinstance(model.graph.initializers["matrix"].const_value, onnx_ir.ExternalTensor)
    assert told == ["matrix", "transposed", "brain", "nibbles"]


def test_what_a_disk_refuses_is_said(model, tmp_path, monkeypatch):
    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_data.os, "write", full)
    cache = StageCache(tmp_path / "cache")
    with pytest.raises(DestinationError, match="no space left"):
        cache.get("unet", {}, lambda folder: {"x": str(target.save(model, folder, external=True))})
    assert cache.entries() == []


def test_a_write_may_take_a_part(model, tmp_path, monkeypatch):
    write = onnx_data.os.write
    monkeypatch.setattr(onnx_data.os, "write", lambda descriptor, data: write(descriptor, data[:999]))
    (tmp_path / "parts").mkdir()
    target.save(model, tmp_path / "parts", external=True)
    monkeypatch.undo()
    (tmp_path / "whole").mkdir()
    target.save(model, tmp_path / "whole", external=True)
    assert (tmp_path / "parts" / DATA_FILE).read_bytes() == (tmp_path / "whole" / DATA_FILE).read_bytes()


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even tiny weights go into a file beside the graph."""
    monkeypatch.setattr(target, "EXTERNAL_DATA_BYTES", 1)


@pytest.mark.usefixtures("beside")
def test_a_bundle_has_its_weights_from_where_the_cache_had_them(tiny_spec, tmp_path, monkeypatch):
    """Written as they are built, copied when they come out of the cache: the same bundle, digests included."""
    copied: list[str] = []
    plain = assemble._copy
    monkeypatch.setattr(assemble, "_copy", lambda source, to: (copied.append(to.name), plain(source, to)))
    spec = replace(tiny_spec, cache_dir=tmp_path / "cache", verify=False, golden=False)
    built = export(replace(spec, out=tmp_path / "built"))
    assert DATA_FILE not in copied
    again = export(replace(spec, out=tmp_path / "again"))
    assert copied.count(DATA_FILE) == 4
    weights = {name: entry for name, entry in built.manifest.files.items() if name.endswith(DATA_FILE)}
    assert len(weights) == 4
    for name, entry in weights.items():
        data = (built.path / name).read_bytes()
        assert entry.sha256 == hashlib.sha256(data).hexdigest() == again.manifest.files[name].sha256
        assert (again.path / name).read_bytes() == data
        assert (built.path / name).stat().st_nlink == 1  # onnx refuses a file that has a second name
    assert DIGEST not in json.dumps(built.manifest.to_json())


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("options", [{"single_graph": True}, {"quantize": "int8"}])
def test_weights_that_are_not_published_as_they_are_built_are_not_in_the_bundle(options, tiny_spec, tmp_path):
    spec = replace(tiny_spec, cache_dir=tmp_path / "cache", verify=False, golden=False, out=tmp_path / "bundle")
    if "single_graph" in options:
        spec = replace(spec, plan=replace(spec.plan, steps=(2,)))
    done = export(replace(spec, **options))
    files = {path.relative_to(done.path).as_posix() for path in done.path.rglob(DATA_FILE)}
    assert files <= set(done.manifest.files)
    assert bool(files) is ("quantize" in options)
    for name in files:
        assert done.manifest.files[name].sha256 == hashlib.sha256((done.path / name).read_bytes()).hexdigest()


@pytest.mark.usefixtures("beside")
def test_what_a_range_scan_keeps_takes_the_place_of_what_was_written(tiny_spec, tmp_path, monkeypatch):
    def scan(self, components):
        nodes = list(onnx_fp16.read(components[Component.UNET].path / MODEL_FILE).graph)
        node = next(node for node in nodes if node.op_type == "Conv")
        kept = KeptOp(node=str(node.name), op="Conv", largest=1e6)
        return {c: Ranges(kept=(kept,) if c is Component.UNET else (), ops=1, largest={}) for c in components}

    monkeypatch.setattr(build.Workshop, "_scan", scan)
    done = export(
        replace(tiny_spec, precision="fp16", cache_dir=tmp_path / "cache", verify=False, golden=False,
                out=tmp_path / "bundle")
    )  # fmt: skip
    assert [record.name for record in done.stages][-3:-1] == ["onnx-fp16-vae_encoder", "onnx-fp16-unet-kept"]
    (kept,) = (tmp_path / "cache" / "onnx-fp16-unet-kept").glob(f"*/files/{DATA_FILE}")
    (raw,) = (tmp_path / "cache" / "onnx-fp16-unet").glob(f"*/files/{DATA_FILE}")
    published = (done.path / "unet" / DATA_FILE).read_bytes()
    assert published == kept.read_bytes() != raw.read_bytes()
    assert done.manifest.files[f"unet/{DATA_FILE}"].sha256 == hashlib.sha256(published).hexdigest()
