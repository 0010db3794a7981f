"""Engine records, names and headers; every reason why an engine may not be used."""

import json
import struct
from dataclasses import replace

import pytest

from hypersd_export.bundle.digest import sha256_file
from hypersd_export.bundle.engines import (
    EngineRecord,
    EngineTensor,
    engine_digest,
    engine_name,
    engine_records,
    read_header,
    why_unusable,
)
from hypersd_export.errors import BundleError

FACTS = {"flavour": "rtx", "version": "1.7.1.116", "capabilities": ("8.6", "8.9")}
OPTIONS = {"optimization_level": 3, "weights": "full"}


def engine_bytes(version=(1, 7, 1, 116), bits=12, body=b"x" * 100):
    """A file with the header that tensorrt_rtx 1.7.1 writes."""
    size = 40 + len(body)
    return struct.pack("<4s4xQQ4B4sQ", b"vtrt", 2, size, *version, b"vtrt", bits) + body


def build(folder, data=None, **changes):
    """(record, path) of an engine in `folder`."""
    data = engine_bytes() if data is None else data
    facts = FACTS | {name: changes.pop(name) for name in FACTS if name in changes}
    digest = engine_digest(onnx_sha256="a" * 64, options=OPTIONS, **facts)
    path = folder / engine_name("unet", precision="fp16", tag="1x4x8x8", digest=digest, **facts)
    path.write_bytes(data)
    record = EngineRecord(
        component="unet",
        file=f"unet/{path.name}",
        precision="fp16",
        weights="full",
        inputs=(
            EngineTensor(name="sample", shape=(-1, 4, 8, 8), dtype="float16", least=(1, 4, 8, 8), most=(2, 4, 8, 8)),
        ),
        outputs=(EngineTensor(name="out_sample", shape=(-1, 4, 8, 8), dtype="float16"),),
        options=OPTIONS,
        onnx_sha256="a" * 64,
        sha256=sha256_file(path),
        bytes=len(data),
        seconds=1.5,
        peak_mb=100.0,
        layers={"HALF": 10, "FLOAT": 2},
        fp32_nodes=("node_Exp_3",),
        **facts,
    )
    return replace(record, **changes), path


def test_a_record_survives_json(tmp_path):
    record, _ = build(tmp_path)
    target = json.loads(json.dumps({"engines": {"unet": record.to_json()}}))
    assert engine_records(target) == {"unet": record}


@pytest.mark.parametrize("target", [{}, {"engines": {}}, {"engines": []}])
def test_a_manifest_without_engines(target):
    with pytest.raises(BundleError, match="lists no TensorRT engines"):
        engine_records(target)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"file": "../x.engine"}, "outside the bundle"),
        ({"file": "/x.engine"}, "outside the bundle"),
        ({"inputs": 3}, "no engine's record"),
        ({"capabilities": None}, "no engine's record"),
        ({"extra": 1}, "no engine's record"),
    ],
)
def test_a_record_that_cannot_be_read(tmp_path, change, said):
    data = build(tmp_path)[0].to_json() | change
    with pytest.raises(BundleError, match=said) as error:
        engine_records({"engines": {"unet": data}})
    assert "\n" not in str(error.value)


def test_a_name_says_what_the_engine_is_for(tmp_path):
    record, path = build(tmp_path)
    assert path.name == f"unet.rtx-1.7.1.116.sm86-sm89.fp16.1x4x8x8.{record.digest[:8]}.engine"


@pytest.mark.parametrize(
    "change",
    [
        {"onnx_sha256": "b" * 64},
        {"version": "1.7.1.117"},
        {"capabilities": ("8.6",)},
        {"flavour": "classic"},
        {"options": OPTIONS | {"optimization_level": 4}},
    ],
)
def test_the_digest_changes_with_all_that_it_is_made_from(tmp_path, change):
    record, _ = build(tmp_path)
    assert replace(record, **change).digest != record.digest
    assert replace(record, seconds=9.0, component="vae_decoder").digest == record.digest


def test_a_header(tmp_path):
    _, path = build(tmp_path, engine_bytes(version=(1, 8, 0, 7), bits=0b110101))
    header = read_header(path)
    assert (header.version, header.capabilities) == ("1.8.0.7", ("7.5", "8.6", "12.0", "12.1"))
    assert header.bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no TensorRT-RTX engine"),
        (b"vtrt", "no TensorRT-RTX engine"),
        (b"ftrt" + engine_bytes()[4:], "no TensorRT-RTX engine"),
        (engine_bytes()[:28] + b"????" + engine_bytes()[32:], "layout that is known"),
        (engine_bytes()[:-1], "139 bytes of 140"),
        (engine_bytes() + b"x", "141 bytes of 140"),
    ],
)
def test_a_header_that_is_none(tmp_path, data, said):
    path = tmp_path / "x.engine"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=said):
        read_header(path)
    with pytest.raises(BundleError, match="cannot read"):
        read_header(tmp_path / "none.engine")


def test_an_engine_that_may_be_used(tmp_path):
    record, path = build(tmp_path)
    here = {"flavour": "rtx", "version": "1.7.1.116", "capability": (8, 9)}
    assert why_unusable(record, path) is None
    assert why_unusable(record, path, **here, onnx_sha256="a" * 64, contents=True) is None


def test_the_header_has_a_byte_for_each_number_of_the_version(tmp_path):
    record, path = build(tmp_path, engine_bytes(version=(1, 8, 0, 300 % 256)), version="1.8.0.300")
    assert why_unusable(record, path) is None


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ({"flavour": "classic"}, "is for tensorrt_rtx, and here is tensorrt: export with --trt-flavour classic"),
        ({"version": "1.8.0.1"}, "built by tensorrt_rtx 1.7.1.116, and here is 1.8.0.1"),
        ({"capability": (12, 0)}, "this GPU has 12.0: export it again with --compute-capability 12.0"),
        ({"capability": (9, 0)}, "this GPU has 9.0: export it again with --trt-flavour classic"),
        ({"onnx_sha256": "b" * 64}, "stale, made from another graph"),
    ],
)
def test_an_engine_of_another_place(tmp_path, here, said):
    reason = why_unusable(*build(tmp_path), **here)
    assert said in reason
    assert "\n" not in reason


def test_a_classic_engine_belongs_to_its_gpu(tmp_path):
    built = build(tmp_path, b"anything", flavour="classic", version="11.4.0.106", capabilities=("9.0",))
    assert why_unusable(*built, flavour="classic", version="11.4.0.106", capability=(9, 0)) is None
    assert "export it again on this GPU" in why_unusable(*built, capability=(8, 9))


@pytest.mark.parametrize(
    ("data", "change", "said"),
    [
        (engine_bytes(), {"bytes": 141}, "140 bytes of 141, it was cut short"),
        (engine_bytes(version=(1, 6, 0, 1)), {}, "built by version 1.6.0.1, and its record says 1.7.1.116"),
        (engine_bytes(bits=4), {}, "for compute capability 8.6, and its record says 8.6, 8.9"),
        (b"x" * 140, {}, "no TensorRT-RTX engine"),
        (engine_bytes(), {"options": {}}, "stale or another's"),
        (engine_bytes(), {"onnx_sha256": "c" * 64}, "stale or another's"),
    ],
)
def test_a_file_that_is_not_what_its_record_says(tmp_path, data, change, said):
    assert said in why_unusable(*build(tmp_path, data, **change))


def test_a_missing_a_renamed_and_a_changed_file(tmp_path):
    record, path = build(tmp_path)
    path.write_bytes(engine_bytes(body=b"y" * 100))
    assert why_unusable(record, path) is None
    assert "was changed" in why_unusable(record, path, contents=True)
    other = path.rename(tmp_path / "unet.engine")
    assert "named no digest" in why_unusable(record, other)
    assert "is missing" in why_unusable(record, path)
