"""A bundle's TensorRT engines as its runtime: checked before they are loaded, loaded when they are first needed.

The steps' arithmetic (a x + b out + c z) stays on the host, in the very code that the ONNX runtime walks. Latents are
small: 64 KB for a 512 px picture, some microseconds over the bus against milliseconds of UNet. Text states and weights
stay on the device. Who wants no copies between the steps exports with --single-graph: there the loop is inside the
engine, and its one enqueue is captured as one CUDA graph.

`tensorrt_rtx` compiles kernels for this GPU at the first call; they are kept in the user's cache for the next process.
"""

import contextlib
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypersd_export.bundle.cache import default_cache_dir
from hypersd_export.bundle.digest import digest_json
from hypersd_export.bundle.disk import make_parents, reason, write_atomic
from hypersd_export.bundle.engines import PIPELINE, EngineRecord, engine_records, why_unusable
from hypersd_export.errors import BundleError, HypersdError
from hypersd_export.runtime.device import Device, Engine
from hypersd_export.runtime.engine_graph import EngineGraph
from hypersd_export.runtime.graph import Notice

KERNELS = "rtx-kernels"
"""The folder of compiled kernels in the cache."""


class KernelsNotKept(Notice):
    """The compiled kernels could not be written: the next process compiles them again."""


class TensorRTRuntime:
    """`Runtime` on one NVIDIA GPU, for engines of one flavour; make it with `open`."""

    name = "tensorrt"

    def __init__(
        self,
        path: Path,
        records: Mapping[str, EngineRecord],
        device: Device,
        *,
        cache_dir: Path | None = None,
    ) -> None:
        """See `open`; the device is that of the records' flavour."""
        self.path, self.records, self.device = path, records, device
        self.graphs: dict[str, EngineGraph] = {}
        """The engines that were loaded, by component."""
        self._cache = cache_dir or default_cache_dir()

    @classmethod
    def open(cls, path: Path, target: Mapping[str, Any]) -> "TensorRTRuntime":
        """Check the engines and start the GPU; nothing is loaded.

        Args:
            path: the bundle.
            target: its manifest's `targets["tensorrt"]`.

        Raises:
            BundleError: an engine is missing, stale, cut short, of another version, or for another GPU.
            MissingBackend, OptionError: the library, the driver or the GPU is missing.
        """
        from hypersd_export.runtime import nvidia

        records = engine_records(target, path / "manifest.json")
        flavours = {record.flavour for record in records.values()}
        if len(flavours) > 1 or not flavours <= set(nvidia.LIBRARIES):
            raise BundleError(f"{path} has engines for {', '.join(sorted(flavours))}: export the bundle again")
        flavour = flavours.pop()
        for record in records.values():
            _refuse(why_unusable(record, path / record.file, flavour=flavour))
            if record.weights == "stripped":
                raise BundleError(f"{record.file} holds no weights: refit it with hypersd-export refit before it runs")
        device = nvidia.open_device(flavour)
        for record in records.values():
            version, capability = device.info.library, device.info.capability
            _refuse(why_unusable(record, path / record.file, version=version, capability=capability))
        return cls(path, records, device)

    @property
    def provider(self) -> str:
        """The GPU and the library."""
        return f"{self.device.info.name}, TensorRT {self.device.info.flavour} {self.device.info.library}"

    @property
    def is_single_graph(self) -> bool:
        """Whether one engine is the whole pipeline."""
        return PIPELINE in self.records

    def graph(self, component: str) -> EngineGraph:
        """A component's engine, loaded at the first call; BundleError if there is none or it does not load."""
        if component not in self.graphs:
            if component not in self.records:
                raise BundleError(f"{self.path} has no engine of {component}: export the bundle again")
            self.graphs[component] = self._load(self.records[component])
        return self.graphs[component]

    def single(self) -> EngineGraph:
        """The engine that is the whole pipeline; BundleError as `graph`."""
        return self.graph(PIPELINE)

    def _load(self, record: EngineRecord) -> EngineGraph:
        path, kernels = self.path / record.file, self._kernels(record)
        compiled = _read(kernels)
        engine = self.device.load(path, compiled)
        _check_interface(path, engine, record)

        def keep(now: bytes) -> None:
            if now != compiled:
                _write(kernels, now)

        return EngineGraph(path, self.device, engine, on_compiled=keep)

    def _kernels(self, record: EngineRecord) -> Path:
        """Where this engine's compiled kernels lie, for this GPU and driver."""
        info = self.device.info
        key = digest_json([record.digest, record.sha256, info.name, info.driver, info.library])
        return self._cache / KERNELS / f"{record.component}-{key[:32]}.bin"


def prune_kernels(cache_dir: Path, *, older_than_days: float | None = None) -> tuple[int, int]:
    """Delete the compiled kernels under a cache that were not used for so long, or all; (files, bytes) that went."""
    limit = float("inf") if older_than_days is None else time.time() - older_than_days * 24 * 3600
    found = [path for path in (cache_dir / KERNELS).glob("*.bin") if path.stat().st_mtime < limit]
    freed = sum(path.stat().st_size for path in found)
    for path in found:
        path.unlink()
    return len(found), freed


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise BundleError(problem)


def _check_interface(path: Path, engine: Engine, record: EngineRecord) -> None:
    """BundleError unless the engine has the inputs and outputs of its record."""
    recorded = {t.name: (t.shape, t.dtype) for t in (*record.inputs, *record.outputs)}
    found = {t.name: (t.shape, t.dtype.name) for t in engine.tensors}
    if found != recorded:
        odd = sorted(name for name in found | recorded if found.get(name) != recorded.get(name))
        raise BundleError(f"{path} differs from its record in {', '.join(odd)}: export the bundle again")


def _read(path: Path) -> bytes | None:
    """The kernels, which are then marked as used now."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    with contextlib.suppress(OSError):  # a cache that is shared read only
        os.utime(path)
    return content


def _write(path: Path, data: bytes) -> None:
    try:
        make_parents(path.parent)
        write_atomic(path, data)
    except (OSError, HypersdError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        warnings.warn(f"the compiled kernels are not kept in {path.parent}: {why}", KernelsNotKept, stacklevel=2)
