"""Pictures of many prompts: of a bundle on its runtime, of the same weights in torch, of the teacher."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.bench.entrants import OpenBundle
from benchmarks.bench.weights import torch_parts
from hypersd_export.bundle.manifest import Manifest
from hypersd_export.diffusion import FewStepPlan
from hypersd_export.errors import BundleError
from hypersd_export.verify.source import Source

Pixels = npt.NDArray[np.uint8]
PIXELS_AT_ONCE = 2 * 512 * 512
"""In one pass of torch's networks, for the memory."""


class Drawer(Protocol):
    """Draws picture i of prompt i from the noise of first_seed + i; the same whoever else is drawn with it."""

    @property
    def key(self) -> Mapping[str, Any]:
        """All that a picture depends on beside prompt and seed, as JSON."""

    def draw(self, prompts: Sequence[str], first_seed: int) -> Pixels:
        """uint8 [N, H, W, 3]; the model is loaded by the first call. Raises `HypersdError`."""

    def close(self) -> None:
        """Give the model back."""


class BundleDrawer:
    """A bundle in this project's runtime; Core ML packages through the interpreter, which runs anywhere."""

    def __init__(self, bundle: OpenBundle, threads: int | None = None) -> None:
        self._bundle, self._threads, self._pipeline = bundle, threads, None

    @property
    def key(self) -> Mapping[str, Any]:
        """See `Drawer`: what the runtime computes may differ from processor to processor."""
        bundle = self._bundle
        return {
            "bundle": bundle.digest, "runtime": bundle.runtime, "provider": bundle.provider, "steps": bundle.steps,
            "machine": platform.machine(),
        }  # fmt: skip

    def draw(self, prompts: Sequence[str], first_seed: int) -> Pixels:
        """See `Drawer`."""
        pipeline: Any = self._pipeline or self._open()
        self._pipeline, steps = pipeline, self._bundle.steps
        drawn = [pipeline(text, seed=first_seed + i, steps=steps).images[0] for i, text in enumerate(prompts)]
        return np.stack([np.asarray(picture.convert("RGB")) for picture in drawn])

    def close(self) -> None:
        """See `Drawer`."""
        self._pipeline = None

    def _open(self) -> Any:
        from hypersd_export.runtime.pipeline import Pipeline

        bundle = self._bundle
        if bundle.runtime == "coreml":
            return interpreted(bundle)
        threads = self._threads if bundle.runtime == "onnx" else None
        return Pipeline.from_bundle(
            bundle.path, runtime=bundle.runtime, provider=bundle.provider, threads=threads, check=False
        )  # fmt: skip


def interpreted(bundle: OpenBundle) -> Any:
    """The pipeline of a bundle's Core ML packages as the MIL interpreter computes it: slow, and anywhere."""
    from hypersd_export.runtime.folder import Folder
    from hypersd_export.runtime.pipeline import Pipeline
    from hypersd_export.runtime.ports import Port
    from hypersd_export.verify.coreml import InterpretedRuntime

    ports = {
        component: {name: Port.from_json(port) for name, port in listed.items()}
        for component, listed in bundle.manifest.targets["coreml"].get("ports", {}).items()
    }
    packages = {name: bundle.path / package for name, package in _packages(bundle.manifest)}
    return Pipeline(
        path=bundle.path, plans=Folder(bundle.path).plans(), digest=bundle.digest,
        runtime=InterpretedRuntime(packages=packages, ports=ports),
    )  # fmt: skip


def _packages(manifest: Manifest) -> list[tuple[str, str]]:
    """(component, path) of the packages; BundleError for a component that is cut into several."""
    found = []
    for name, component in manifest.targets["coreml"]["components"].items():
        if len(component["packages"]) != 1:
            raise BundleError(f"the {name} is {len(component['packages'])} packages: export without --chunk-unet")
        found.append((name, component["packages"][0]))
    return found


class TorchDrawer:
    """A bundle's weights in torch, float32, by a plan."""

    def __init__(self, bundle: OpenBundle, source: Source, plan: FewStepPlan) -> None:
        self._bundle, self._source, self._plan, self._parts = bundle, source, plan, None

    @property
    def key(self) -> Mapping[str, Any]:
        """See `Drawer`; the bundle gives size and tokenizer, which its weights' digests do not hold."""
        from benchmarks.sampling import SAMPLER

        options = self._bundle.manifest.options
        return {
            "torch": SAMPLER, "source": self._source.digests, "plan": self._plan.to_json(),
            "size": [options.get("width"), options.get("height")], "machine": platform.machine(),
        }  # fmt: skip

    def draw(self, prompts: Sequence[str], first_seed: int) -> Pixels:
        """See `Drawer`; rounding apart."""
        from trainer.pretrain.vae import to_uint8

        parts: Any = self._parts or torch_parts(self._bundle.path, self._source)
        self._parts = parts
        options = self._bundle.manifest.options
        size = max(1, PIXELS_AT_ONCE // (int(options.get("width", 1)) * int(options.get("height", 1))))
        drawn = [
            parts.draw(list(prompts[i : i + size]), self._plan, first_seed=first_seed + i)
            for i in range(0, len(prompts), size)
        ]
        return np.concatenate([to_uint8(part).permute(0, 2, 3, 1).numpy() for part in drawn])

    def close(self) -> None:
        """See `Drawer`."""
        self._parts = None
