"""Engines that `tensorrt_rtx` really builds, with no GPU, each in a process of its own; and what goes wrong there."""

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from hypersd_export.bundle.digest import sha256_file
from hypersd_export.bundle.engines import PIPELINE, EngineRecord, read_header, why_unusable
from hypersd_export.errors import BuildError, MissingBackend, OptionError
from hypersd_export.targets import tensorrt, tensorrt_vendor
from hypersd_export.targets.tensorrt import EngineOptions, build, onnx_digest
from tests.export.tensorrt_graphs import mixed, refused, small_net, two_inputs

OPTIONS = EngineOptions(flavour="rtx", capabilities=("8.6", "8.9"))

rtx = pytest.mark.skipif(not tensorrt_vendor.installed("rtx"), reason="tensorrt_rtx is not installed")


def engine(onnx, folder, component="unet", **more):
    """(record, path) of an engine that is built in `folder`."""
    folder.mkdir(exist_ok=True)
    record = build(onnx, folder, component=component, options=more.pop("options", OPTIONS), **more)
    return record, folder / Path(record.file).name


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    said: list[str] = []
    return *engine(small_net(folder / "m.onnx"), folder / "out", progress=said.append), said


@rtx
def test_an_engine_and_its_record(built):
    record, path, said = built
    assert path.name == f"unet.rtx-{record.version}.sm86-sm89.fp16.1x4x8x8.{record.digest[:8]}.engine"
    assert record.version == tensorrt_vendor.installed_version("rtx")
    assert record.file == f"unet/{path.name}"
    assert [(t.name, t.shape, t.dtype) for t in record.inputs] == [
        ("sample", (1, 4, 8, 8), "float16"),
        ("timestep", (1, 1), "float32"),
    ]
    assert [(t.name, t.shape, t.dtype) for t in record.outputs] == [("out_sample", (1, 4, 8, 8), "float16")]
    assert record.layers == {"FLOAT": 4, "HALF": 6}
    assert (record.bytes, record.sha256) == (path.stat().st_size, sha256_file(path))
    assert record.peak_mb > 20
    assert [path.name] == [one.name for one in path.parent.iterdir()]
    assert said[0] == "parsing"
    assert any("uilding" in line for line in said)
    assert EngineRecord.from_json(json.loads(json.dumps(record.to_json())), "here") == record


@rtx
def test_the_header_is_what_was_asked_for(built):
    record, path, _ = built
    header = read_header(path)
    assert (header.version, header.capabilities) == (record.version, ("8.6", "8.9"))
    here = {"flavour": "rtx", "version": record.version, "onnx_sha256": record.onnx_sha256, "contents": True}
    assert why_unusable(record, path, **here, capability=(8, 9)) is None
    assert "export it again with --compute-capability 12.0" in why_unusable(record, path, **here, capability=(12, 0))


@rtx
def test_the_library_itself_knows_its_engines(built, tmp_path):
    _, path, _ = built
    vendor = tensorrt_vendor.Vendor.open("rtx")
    assert not vendor.malformed(path)
    (tmp_path / "foreign").write_bytes(b"ftrt" + path.read_bytes()[4:])
    assert vendor.malformed(tmp_path / "foreign")


@rtx
@pytest.mark.parametrize("damage", ["truncated", "other version", "other graph", "other record"])
def test_a_stale_or_damaged_engine(built, tmp_path, damage):
    record, path, _ = built
    data = path.read_bytes()
    copy = tmp_path / path.name
    copy.write_bytes(data[:-1] if damage == "truncated" else data)
    if damage == "other version":
        copy.write_bytes(data[:25] + b"\x06" + data[26:])
        assert "was built by version 1.6" in why_unusable(record, copy)
    elif damage == "truncated":
        assert "it was cut short" in why_unusable(record, copy)
        assert "it was cut short" in why_unusable(replace(record, bytes=len(data) - 1), copy)
    elif damage == "other graph":
        assert "stale" in why_unusable(record, copy, onnx_sha256="0" * 64)
    else:
        assert "stale or another's" in why_unusable(replace(record, onnx_sha256="0" * 64), copy)


@rtx
def test_external_data_other_capabilities_and_the_same_bytes_again(built, tmp_path):
    record = built[0]
    net = small_net(tmp_path / "m.onnx", external=True)
    assert (tmp_path / "m.onnx_data").is_file()
    options = EngineOptions(flavour="rtx", capabilities=("12.0",), optimization_level=1)
    first, where = engine(net, tmp_path / "a", PIPELINE, options=options)
    assert first.file == where.name
    assert where.name.startswith(f"pipeline.rtx-{first.version}.sm120.fp16.")
    assert read_header(where).capabilities == ("12.0",)
    assert {first.onnx_sha256, first.digest} & {record.onnx_sha256, record.digest} == set()
    again, _ = engine(net, tmp_path / "b", PIPELINE, options=options)
    assert again.sha256 == first.sha256
    before = onnx_digest(net)
    data = tmp_path / "m.onnx_data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x01")
    assert onnx_digest(net) != before


@rtx
def test_float32_only_where_it_is_allowed(tmp_path):
    net = small_net(tmp_path / "island.onnx", island=True)
    with pytest.raises(BuildError, match=r"node conv \(Conv\) is float32 and ought to be fp16"):
        engine(net, tmp_path)
    record, path = engine(net, tmp_path / "out", fp32_nodes=["conv"])
    assert record.fp32_nodes == ("conv",)
    assert record.layers["FLOAT"] == 6
    assert path.is_file()
    with pytest.raises(BuildError, match=r"node conv \(Conv\) is fp16 and ought to be float32"):
        engine(small_net(tmp_path / "half.onnx"), tmp_path, fp32_nodes=["conv"])
    with pytest.raises(BuildError, match="weight w_conv is stored in float32 and cast to fp16"):
        engine(small_net(tmp_path / "weight.onnx", float_weight=True), tmp_path)
    assert not list(tmp_path.glob(".engine-*"))
    assert not list(tmp_path.glob("*.engine"))


@rtx
def test_a_profile(tmp_path):
    net = two_inputs(tmp_path / "m.onnx", ["n", 4], ["n", 4])
    shapes = ((1, 4), (2, 4), (8, 4))
    record, path = engine(net, tmp_path / "out", profile={"a": shapes, "b": shapes})
    assert [(t.shape, t.least, t.most) for t in record.inputs] == [((-1, 4), (1, 4), (8, 4))] * 2
    assert ".1x4-8x4." in path.name
    with pytest.raises(OptionError, match="both are 'n'"):
        engine(net, tmp_path, profile={"a": shapes, "b": ((1, 4), (2, 4), (4, 4))})


@rtx
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (refused, r"does not take .*m.onnx: node odd \(Frobnicate\): Plugin not found"),
        (mixed, r"does not take .*m.onnx: node odd_sum \(Add\): ElementWiseOperation SUM must have same input types"),
    ],
)
def test_a_graph_that_the_parser_refuses(tmp_path, make, said):
    with pytest.raises(BuildError, match=said) as error:
        engine(make(tmp_path / "m.onnx"), tmp_path)
    assert "\n" not in str(error.value)


@rtx
@pytest.mark.skipif(tensorrt_vendor.gpu_capability() is not None, reason="with a GPU this build succeeds")
def test_a_build_that_fails_says_why(tmp_path):
    """Without a GPU no engine that can be refitted is written; `resolve` refuses to ask, and the library says so."""
    net = small_net(tmp_path / "m.onnx")
    with pytest.raises(BuildError, match="TensorRT could not build unet: ") as error:
        engine(net, tmp_path, options=replace(OPTIONS, weights="refit"))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.engine"))


def test_a_missing_onnx_file(tmp_path):
    with pytest.raises(BuildError, match=r"no\.onnx is missing"):
        engine(tmp_path / "no.onnx", tmp_path)


def test_a_library_that_is_not_installed(tmp_path, monkeypatch):
    """Classic TensorRT is in no environment of the tests; the worker's error comes back as it was."""
    if tensorrt_vendor.installed("classic"):
        pytest.skip("tensorrt is installed")
    with pytest.raises(MissingBackend, match=r"needs tensorrt, .* pip install 'hypersd\[tensorrt-classic\]'"):
        engine(small_net(tmp_path / "m.onnx"), tmp_path, options=replace(OPTIONS, flavour="classic"))
    monkeypatch.setattr(tensorrt_vendor, "FLAVOURS", {"rtx": "tensorrt_rtx_that_is_not_there"})
    with pytest.raises(MissingBackend, match=r"pip install 'hypersd\[tensorrt\]'"):
        tensorrt_vendor.module("rtx")


def test_a_timing_cache_is_classics(tmp_path):
    with pytest.raises(OptionError, match="TensorRT-RTX measures nothing while it builds"):
        engine(small_net(tmp_path / "m.onnx"), tmp_path, timing_cache=tmp_path / "cache")


def worker(tmp_path, monkeypatch, code):
    """Let the worker be this code, which gets the request's path as its argument."""
    (tmp_path / "standin.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(tensorrt, "WORKER", "standin")
    return small_net(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"was killed \(out of memory\?\)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11"),
        ("raise SystemError('boom')", "ended with exit code 1: SystemError: boom"),
        ("pass", "ended with exit code 0"),
    ],
)
def test_a_worker_that_ends_without_a_report(tmp_path, monkeypatch, code, said):
    net = worker(tmp_path, monkeypatch, code)
    with pytest.raises(BuildError, match=f"the engine of unet: its process (ended|was killed).*{said[-12:]}") as error:
        engine(net, tmp_path)
    assert said.replace("\\", "") in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob(".engine-*"))


def test_ctrl_c_ends_the_worker(tmp_path, monkeypatch):
    code = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
    net = worker(tmp_path, monkeypatch, code)
    pids: list[int] = []

    def interrupt(line):
        pids.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine(net, tmp_path, progress=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


@rtx
def test_the_worker_stops_at_a_signal(tmp_path, monkeypatch):
    """A SIGINT to the worker alone, as a terminal sends it to both: the build is cancelled at its next step."""
    net = small_net(tmp_path / "m.onnx")
    code = """
import os, signal, sys
from hypersd_export.targets import tensorrt_worker as worker
say = print
def told(text, **more):
    say(text, **more)
    if text != "parsing":
        os.kill(os.getpid(), signal.SIGINT)
worker.print = told
worker.INTERVAL_S = 0
sys.exit(worker.main())
"""
    worker(tmp_path, monkeypatch, code)
    with pytest.raises(KeyboardInterrupt):
        engine(net, tmp_path)
    assert not list(tmp_path.glob("*.engine"))


def test_an_engine_that_is_not_what_was_asked_for_is_not_kept(tmp_path, monkeypatch):
    header = struct.pack("<4s4xQQ4B4sQ", b"vtrt", 2, 40, 1, 7, 1, 116, b"vtrt", 4)
    report = {
        "version": "1.7.1.116", "outputs": [], "layers": {}, "seconds": 1.0, "peak_mb": 1.0,
        "inputs": [{"name": "a", "shape": [1], "dtype": "float16", "least": [], "most": []}],
    }  # fmt: skip
    code = f"""
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
pathlib.Path(json.loads(path.read_text())["engine"]).write_bytes({header!r})
path.with_name("report.json").write_text({json.dumps(report)!r})
"""
    net = worker(tmp_path, monkeypatch, code)
    with pytest.raises(
        BuildError, match=r"not what was asked for: .* is for compute capability 8\.6, and .* 8\.6, 8\.9"
    ):
        engine(net, tmp_path)
    assert not list(tmp_path.glob("*.engine"))
