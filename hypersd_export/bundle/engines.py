"""TensorRT engines in a bundle: their file names, their records in the manifest, and whether one may be used here.

An engine is a program for one library version and some GPUs, with one LoRA's weights in it; used elsewhere it fails
late or draws something else. So its file name ends in the digest of all that it was made from, its record says the
same at length, and `why_unusable` compares both with the file and with the machine. Needs no vendor library: of an
engine for `tensorrt_rtx` the first bytes are read, of one for `tensorrt` (whose layout we do not know) the size alone.
"""

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hypersd_export.bundle.digest import digest_json, is_outside, sha256_file
from hypersd_export.errors import BundleError

SUFFIX = ".engine"
RTX, CLASSIC = "rtx", "classic"
FLAVOURS: Mapping[str, str] = {RTX: "tensorrt_rtx", CLASSIC: "tensorrt"}
"""The two libraries of one vendor, by our name for them: their Python modules."""
WEIGHTS = ("full", "stripped", "refit")
"""`stripped` holds no weights and has to be refitted before it runs; `refit` holds them and can take others."""
PIPELINE = "pipeline"
"""The component name of an engine that is the whole pipeline."""

_HEADER = struct.Struct("<4s12xQ4B4sQ")
_MAGIC = b"vtrt"
_CAPABILITY_BITS = {"7.5": 1, "8.0": 2, "8.6": 4, "8.9": 8, "12.0": 16, "12.1": 32}
RTX_CAPABILITIES = tuple(_CAPABILITY_BITS)
"""The compute capabilities that `tensorrt_rtx` builds for."""


def capability_name(capability: tuple[int, int]) -> str:
    """A GPU's compute capability as it is written, such as 8.9."""
    return ".".join(map(str, capability))


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineTensor:
    """An input or output: name, shape (-1 where it is free), NumPy's name of its type; bounds of a free input."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    least: tuple[int, ...] = ()
    most: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRecord:
    """What the manifest says about one engine (`targets.tensorrt.engines.<component>`).

    file: relative to the bundle, with forward slashes. capabilities: such as ("8.6", "8.9"), ascending. version: of the
    library, all four numbers of it. precision: what the arithmetic is, but for `fp32_nodes`, which the range scan keeps
    in float32. onnx_sha256: of the graph and its data file. layers: how many layers give each type, by TensorRT's name.
    options: the builder's. seconds, peak_mb: what the build took, the latter of its process alone.
    """

    component: str
    file: str
    flavour: str
    version: str
    capabilities: tuple[str, ...]
    precision: str
    weights: str
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    options: Mapping[str, Any]
    onnx_sha256: str
    sha256: str
    bytes: int
    seconds: float
    peak_mb: float
    layers: Mapping[str, int]
    fp32_nodes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Hex SHA-256 over all that the engine was made from; its file name has the first eight digits."""
        return engine_digest(
            onnx_sha256=self.onnx_sha256,
            flavour=self.flavour,
            version=self.version,
            capabilities=self.capabilities,
            options=self.options,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any, where: str) -> "EngineRecord":
        """Read what `to_json` wrote; `where` names it in the error.

        Raises:
            BundleError: a key is missing, unknown or of another type, or `file` lies outside the bundle.
        """
        try:
            record = cls(
                **{
                    **data,
                    "capabilities": tuple(map(str, data["capabilities"])),
                    "inputs": tuple(map(_tensor, data["inputs"])),
                    "outputs": tuple(map(_tensor, data["outputs"])),
                    "options": dict(data["options"]),
                    "bytes": int(data["bytes"]),
                    "layers": {str(name): int(count) for name, count in data["layers"].items()},
                    "fp32_nodes": tuple(map(str, data.get("fp32_nodes", ()))),
                }
            )
            outside = is_outside(record.file)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise BundleError(f"{where} is no engine's record ({str(error)[:80]}): export the bundle again") from error
        if outside:
            raise BundleError(f"{where} names {record.file[:80]!r}, outside the bundle: do not trust this bundle")
        return record


def _tensor(data: Mapping[str, Any]) -> EngineTensor:
    sides = {name: tuple(map(int, data.get(name, ()))) for name in ("shape", "least", "most")}
    return EngineTensor(name=str(data["name"]), dtype=str(data["dtype"]), **sides)


def engine_records(target: Mapping[str, Any], where: Path | str = "manifest.json") -> dict[str, EngineRecord]:
    """The engines of a manifest's `targets["tensorrt"]`, by component; of a single graph there is one, `PIPELINE`.

    Raises:
        BundleError: there are none, or a record cannot be read.
    """
    engines = target.get("engines")
    if not isinstance(engines, Mapping) or not engines:
        raise BundleError(f"{where} lists no TensorRT engines: export the bundle again with --target tensorrt")
    return {
        str(name): EngineRecord.from_json(data, f"{where}, targets.tensorrt.engines.{name}")
        for name, data in engines.items()
    }


def engine_digest(
    *, onnx_sha256: str, flavour: str, version: str, capabilities: Sequence[str], options: Mapping[str, Any]
) -> str:
    """Hex SHA-256 over all that an engine is made from; `options` holds JSON values."""
    return digest_json([onnx_sha256, flavour, version, list(capabilities), dict(options)])


def engine_name(
    component: str,
    *,
    flavour: str,
    version: str,
    capabilities: Sequence[str],
    precision: str,
    tag: str,
    digest: str,
) -> str:
    """`unet.rtx-1.7.1.116.sm86-sm89.fp16.1x4x64x64.0123abcd.engine`: `tag` says the shapes, `digest` is cut."""
    machines = "-".join(f"sm{capability.replace('.', '')}" for capability in capabilities)
    return f"{component}.{flavour}-{version}.{machines}.{precision}.{tag}.{digest[:8]}{SUFFIX}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineHeader:
    """What the first bytes of an engine for `tensorrt_rtx` say: library version, capabilities, the file's size."""

    version: str
    capabilities: tuple[str, ...]
    bytes: int


def read_header(path: Path) -> EngineHeader:
    """The header of an engine for `tensorrt_rtx`, whose layout was found by looking (version 1.7).

    Raises:
        BundleError: the file cannot be read, is no such engine, or is shorter or longer than its header says.
    """
    try:
        with path.open("rb") as stream:
            first = stream.read(_HEADER.size)
        size = path.stat().st_size
    except OSError as error:
        raise BundleError(f"cannot read {path} ({error.strerror}): export the bundle again") from error
    if len(first) < _HEADER.size or not first.startswith(_MAGIC):
        raise BundleError(f"{path} is no TensorRT-RTX engine: export the bundle again")
    _, said, major, minor, patch, build, again, bits = _HEADER.unpack(first)
    if again != _MAGIC:
        raise BundleError(f"{path} is no TensorRT-RTX engine of a layout that is known: use the version that made it")
    if said != size:
        raise BundleError(f"{path} has {size:,} bytes of {said:,}: it was cut short or added to; export it again")
    found = tuple(name for name, bit in _CAPABILITY_BITS.items() if bits & bit)
    return EngineHeader(version=f"{major}.{minor}.{patch}.{build}", capabilities=found, bytes=said)


def why_unusable(
    record: EngineRecord,
    path: Path,
    *,
    flavour: str | None = None,
    version: str | None = None,
    capability: tuple[int, int] | None = None,
    onnx_sha256: str | None = None,
    contents: bool = False,
) -> str | None:
    """Why the engine file at `path` may not be used, with the way out, in one line; None if it may.

    What is None is not compared.

    Args:
        record: what the manifest says about it.
        path: the file.
        flavour: "rtx" or "classic", the library that is to run it.
        version: that library's, all four numbers; an engine of another version does not load, or not surely.
        capability: the GPU's, such as (8, 9).
        onnx_sha256: of the graph that it ought to have been made from.
        contents: read the whole file and compare its sha256.
    """
    problem = _wrong_place(record, flavour, version, capability) or _wrong_file(record, path, onnx_sha256)
    if problem is None and contents and sha256_file(path) != record.sha256:
        return f"{path.name} was changed after it was built: export the bundle again"
    return problem


def _wrong_place(
    record: EngineRecord, flavour: str | None, version: str | None, capability: tuple[int, int] | None
) -> str | None:
    name = PurePosixPath(record.file).name
    if flavour is not None and record.flavour != flavour:
        return (
            f"{name} is for {_module(record.flavour)}, and here is {_module(flavour)}: "
            f"export with --trt-flavour {flavour}, or install {_module(record.flavour)}"
        )
    if version is not None and record.version != version:
        return (
            f"{name} was built by {_module(record.flavour)} {record.version}, and here is {version}: "
            "export it again here, or install that version"
        )
    if capability is not None:
        here = capability_name(capability)
        if here not in record.capabilities:
            option = f" with --compute-capability {here}" if record.flavour == RTX and here in RTX_CAPABILITIES else ""
            other = " with --trt-flavour classic" if record.flavour == RTX and not option else ""
            return (
                f"{name} is for compute capability {', '.join(record.capabilities)}, and this GPU has {here}: "
                f"export it again{option or other or ' on this GPU'}"
            )
    return None


def _wrong_file(record: EngineRecord, path: Path, onnx_sha256: str | None) -> str | None:
    again = "export the bundle again"
    if not path.is_file():
        return f"{path.name} is missing: {again}"
    found = re.search(r"\.([0-9a-f]{8})" + re.escape(SUFFIX) + "$", path.name)
    if onnx_sha256 is not None and record.onnx_sha256 != onnx_sha256:
        return f"{path.name} is stale, made from another graph (other weights, LoRA or shapes): {again}"
    if found is None or found[1] != record.digest[:8]:
        named = "no digest" if found is None else found[1]
        return (
            f"{path.name} is stale or another's: it is named {named}, and its record says {record.digest[:8]}; {again}"
        )
    size = path.stat().st_size
    if size != record.bytes:
        return f"{path.name} has {size:,} bytes of {record.bytes:,}, it was cut short or changed: {again}"
    if record.flavour != RTX:
        return None
    try:
        header = read_header(path)
    except BundleError as error:
        return str(error)
    if header.version != _in_bytes(record.version):
        return f"{path.name} was built by version {header.version}, and its record says {record.version}: {again}"
    if header.capabilities != record.capabilities:
        listed, said = ", ".join(header.capabilities), ", ".join(record.capabilities)
        return f"{path.name} is for compute capability {listed}, and its record says {said}: {again}"
    return None


def _in_bytes(version: str) -> str:
    """A version as the header has it: a byte for each number."""
    return ".".join(str(int(number) % 256) if number.isdecimal() else number for number in version.split("."))


def _module(flavour: str) -> str:
    return FLAVOURS.get(flavour, flavour)
