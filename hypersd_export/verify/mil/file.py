"""The files of a Core ML package, read without Core ML: the manifest, the model's protobuf, and weights mapped lazily.

Only coremltools' protobuf classes are used, none of its loaders, passes or type inference: what is read is what is on
disk.

The weights file begins with 64 bytes; each weight has a record of 64 bytes (its offset is what the model holds) that
says where its bytes are. Elements of less than a byte are packed from the least significant bit on.
"""

import json
import logging
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hypersd_export.errors import BundleError, MissingBackend

NAMES = {
    1: "bool", 2: "string", 10: "fp16", 11: "fp32", 12: "fp64",
    21: "int8", 22: "int16", 23: "int32", 24: "int64", 25: "int4",
    31: "uint8", 32: "uint16", 33: "uint32", 34: "uint64", 35: "uint4", 36: "uint2", 37: "uint1", 38: "uint6",
    39: "uint3",
}  # fmt: skip
"""The element types of MIL by their number in the protobuf."""
PACKED_BITS = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}
NUMPY = {
    "bool": np.bool_, "fp16": np.float16, "fp32": np.float32, "fp64": np.float64,
    "int8": np.int8, "int16": np.int16, "int32": np.int32, "int64": np.int64,
    "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64,
    "int4": np.int8, **dict.fromkeys(("uint1", "uint2", "uint3", "uint4", "uint6"), np.uint8),
}  # fmt: skip
RECORD_SENTINEL = 0xDEADBEEF
MODEL_PATH = "@model_path"

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorType:
    """An element type and a shape; None is an axis that is free (flexible shapes)."""

    element: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.element} [{', '.join('?' if size is None else str(size) for size in self.shape)}]"

    def allows(self, shape: tuple[int, ...]) -> bool:
        """Whether a shape is this one, free axes aside."""
        return len(shape) == len(self.shape) and all(
            want is None or want == got for want, got in zip(self.shape, shape, strict=True)
        )


def tensor_type(proto: Any) -> TensorType:
    """A `ValueType` of the protobuf; what is not a tensor is of the element type "other"."""
    if proto.WhichOneof("type") != "tensorType":
        return TensorType(element="other", shape=())
    tensor = proto.tensorType
    shape = tuple(
        int(axis.constant.size) if axis.WhichOneof("dimension") == "constant" else None for axis in tensor.dimensions
    )
    return TensorType(element=NAMES.get(tensor.dataType, f"type {tensor.dataType}"), shape=shape)


@dataclass(slots=True)
class PackageFile:
    """A package on disk: its parsed model, and its weights files, which are mapped when first needed."""

    path: Path
    model: Any
    root: Path
    _mapped: dict[str, Array] = field(default_factory=dict)

    def weights(self, name: str) -> Array:
        """The bytes of a weights file as the model names it (`@model_path/weights/weight.bin`), mapped, not read."""
        if name not in self._mapped:
            file = self.root / name.removeprefix(MODEL_PATH).lstrip("/")
            if not file.resolve().is_relative_to(self.root.resolve()):
                raise BundleError(f"{self.path}: the weights file {name} lies outside of the package: export it again")
            if not file.is_file() or not file.stat().st_size:
                what = "empty" if file.is_file() else "missing"
                raise BundleError(
                    f"{self.path}: its weights file {name} is {what}: copy the whole folder, or export it again"
                )
            self._mapped[name] = np.memmap(file, dtype=np.uint8, mode="r")
        return self._mapped[name]

    def value(self, proto: Any) -> Any:
        """A `Value` of the protobuf: an array of its declared shape, a string, or a tuple of values."""
        kind = tensor_type(proto.type)
        if proto.WhichOneof("value") == "blobFileValue":
            return self._stored(proto.blobFileValue, kind)
        which = proto.immediateValue.WhichOneof("value")
        if which in ("list", "tuple"):
            return tuple(self.value(item) for item in getattr(proto.immediateValue, which).values)
        if which != "tensor":
            raise BundleError(f"{self.path}: a constant holds a {which}, not numbers or text: export it again")
        return self._immediate(proto.immediateValue.tensor, kind)

    def _immediate(self, tensor: Any, kind: TensorType) -> Any:
        which = tensor.WhichOneof("value")
        values: Any = [] if which is None else getattr(tensor, which).values
        if kind.element == "string":
            return str(values[0]) if len(values) == 1 and kind.shape == () else tuple(values)
        if which == "bytes":
            return self._unpack(np.frombuffer(values, dtype=np.uint8), kind)
        return np.asarray(values, dtype=NUMPY[kind.element]).reshape(_constant(kind))

    def _stored(self, blob: Any, kind: TensorType) -> Array:
        weights, at = self.weights(blob.fileName), int(blob.offset)
        if at + 64 > len(weights):
            raise BundleError(
                f"{self.path}: {blob.fileName} ends at byte {len(weights)}, before the weight at {at}: export it again"
            )
        sentinel, _, size, start = struct.unpack("<IIQQ", weights[at : at + 24].tobytes())
        if sentinel != RECORD_SENTINEL or start + size > len(weights):
            raise BundleError(f"{self.path}: {blob.fileName} holds no whole weight at byte {at}: export it again")
        return self._unpack(weights[start : start + size], kind)

    def _unpack(self, raw: Array, kind: TensorType) -> Array:
        shape = _constant(kind)
        count = int(np.prod(shape, dtype=np.int64))
        bits = PACKED_BITS.get(kind.element)
        wanted = -(-count * bits // 8) if bits else count * np.dtype(NUMPY[kind.element]).itemsize
        if len(raw) != wanted:
            raise BundleError(
                f"{self.path}: a weight of type {kind} has {len(raw)} bytes, not {wanted}: export it again"
            )
        if bits:
            return unpack_bits(raw, bits, count, signed=kind.element.startswith("int")).reshape(shape)
        return raw.view(NUMPY[kind.element]).reshape(shape)


def _constant(kind: TensorType) -> tuple[int, ...]:
    return tuple(size for size in kind.shape if size is not None)


def unpack_bits(raw: Array, bits: int, count: int, *, signed: bool = False) -> Array:
    """`count` integers of `bits` bits each from bytes, least significant bit first: uint8, or int8 if `signed`."""
    flat = np.unpackbits(np.ascontiguousarray(raw), bitorder="little")[: count * bits].reshape(count, bits)
    values = (flat << np.arange(bits, dtype=np.uint8)).sum(axis=1).astype(np.int16)
    if signed:
        return np.where(values >= 1 << (bits - 1), values - (1 << bits), values).astype(np.int8)
    return values.astype(np.uint8)


def read_package(path: Path) -> PackageFile:
    """Open a `.mlpackage` folder; the weights stay on disk.

    Raises `MissingBackend` without coremltools, `BundleError` for a folder that is no package or is damaged.
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)  # its notes on versions and on having no Mac
    try:
        from coremltools.proto import Model_pb2
    except ModuleNotFoundError as error:
        raise MissingBackend(str(error.name), "coreml", "reading a Core ML package") from error
    from google.protobuf.message import DecodeError

    manifest = path / "Manifest.json"
    if not path.is_dir():
        raise BundleError(f"{path} is missing: export it again")
    if not manifest.is_file():
        raise BundleError(f"{path} is no Core ML package: it has no Manifest.json (give the .mlpackage folder)")
    try:
        described: Mapping[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
        file = path / "Data" / described["itemInfoEntries"][described["rootModelIdentifier"]]["path"]
        model = Model_pb2.Model.FromString(file.read_bytes())
    except (ValueError, KeyError, TypeError, OSError, DecodeError) as error:
        raise BundleError(
            f"{path}: the package cannot be read ({' '.join(str(error).split())[:200]}): export it again"
        ) from error
    if not model.HasField("mlProgram"):
        raise BundleError(f"{path} holds a {model.WhichOneof('Type')}, not an ML program: convert it as mlprogram")
    return PackageFile(path=path, model=model, root=file.parent)
