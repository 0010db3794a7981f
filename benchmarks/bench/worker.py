"""`python -m benchmarks.bench.worker REQUEST`: this project's own painters, and the machine's speed, in a process.

REQUEST is JSON: {"kind": "bundle" | "torch" | "compile" | "speed", …}; `benchmarks.bench.protocol` says what is spoken.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench.machine import versions
from benchmarks.bench.protocol import Clocked, Painter, Seconds, serve
from benchmarks.bench.weights import DTYPES, Places, source_of, torch_parts
from hypersd_export.diffusion import FewStepPlan
from hypersd_export.errors import MissingBackend

Drawn = tuple[Mapping[str, float], Any]


class BundlePainter:
    """A bundle in this project's torch-free runtime; bundle, runtime, provider, steps, threads, prompt, cuda_graph."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self._request = request
        self._pipeline: Any = None

    def load(self) -> Mapping[str, Any]:
        """Open the bundle, its digests compared as `hypersd-generate` does it, and every graph that drawing needs."""
        from hypersd_export.runtime.pipeline import Pipeline

        asked = self._request
        pipeline = Pipeline.from_bundle(
            asked["bundle"], runtime=asked["runtime"], provider=asked["provider"],
            threads=asked["threads"] if asked["runtime"] in (None, "onnx") else None,
            cuda_graph=asked["cuda_graph"],
        )  # fmt: skip
        graphs = ("text_encoder", "unet", "vae_decoder")
        for graph in () if pipeline.is_single_graph else graphs:
            pipeline.runtime.graph(graph)
        if pipeline.is_single_graph:
            pipeline.runtime.single()
        self._pipeline = pipeline
        return {"provider": pipeline.provider, "versions": versions("numpy", "onnxruntime", "onnxruntime-gpu")}

    def draw(self, seed: int, images: int) -> Drawn:
        """See `Painter`; the time of a single graph is all `pipeline`."""
        asked = self._request
        result = self._pipeline(asked["prompt"], seed=seed, num_images=images, steps=asked["steps"])
        return result.seconds, result.images


class TorchPainter:
    """A bundle's weights in torch, eager or compiled, by a plan; bundle, places, loras, plan, threads, prompt, device,
    precision."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self._request, self._seconds = request, Seconds()
        self._parts: Any = None
        self._plan = FewStepPlan.from_json(request["plan"])

    def load(self) -> Mapping[str, Any]:
        """Fuse the LoRAs into the base; a compiled network is compiled when it first draws."""
        import torch

        from benchmarks.sampling import Parts

        bundle, compiled = Path(self._request["bundle"]), self._request["kind"] == "compile"
        torch.set_num_threads(self._request["threads"])
        places, device = Places.from_json(self._request["places"]), self._request["device"]
        if device == "cuda" and not torch.cuda.is_available():
            raise MissingBackend("a torch built for CUDA", "bench", "torch on the GPU")
        source = source_of(bundle, places, loras=self._request["loras"])
        parts = torch_parts(bundle, source, precision=self._request["precision"], device=device)
        unet, vae = parts.unet, parts.vae
        if compiled:
            unet = torch.compile(unet)
            vae.decode = torch.compile(vae.decode)
        timed = ((parts.text_encoder, "text_encoder"), (unet, "unet"), (vae, "vae_decoder"))
        wait = torch.cuda.synchronize if device == "cuda" else None  # CUDA's calls return before they are done
        text_encoder, unet, vae = (Clocked(inner, name, self._seconds, wait=wait) for inner, name in timed)
        self._parts = Parts(unet, vae, text_encoder, parts.tokenizer, latents=parts.latents)
        return {"provider": device, "versions": versions("torch", "diffusers", "transformers")}

    def draw(self, seed: int, images: int) -> Drawn:
        """See `Painter`; picture i is that of seed + i."""
        from trainer.pretrain.vae import to_uint8

        self._seconds.clear()
        pictures = self._parts.draw([self._request["prompt"]] * images, self._plan, first_seed=seed)
        return self._seconds, to_uint8(pictures).permute(0, 2, 3, 1).cpu().numpy()


class Speed:
    """What the machine can do, in the same rounds as everyone: a matrix product in `precision`, and a copy."""

    SIDE, COPY_BYTES = {"cpu": 1024, "cuda": 8192}, {"cpu": 128 * 2**20, "cuda": 2**30}

    def __init__(self, request: Mapping[str, Any]) -> None:
        self._threads, self._device = int(request["threads"]), str(request["device"])
        self._precision = str(request["precision"])
        self._side, self._copy_bytes = self.SIDE[self._device], self.COPY_BYTES[self._device]
        self._arrays: Any = None

    def load(self) -> Mapping[str, Any]:
        """Fill the matrices."""
        import torch

        torch.set_num_threads(self._threads)
        side, device, floats = self._side, self._device, self._copy_bytes // 4
        generator, dtype = torch.Generator().manual_seed(0), getattr(torch, DTYPES[self._precision])
        a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
        ones = torch.ones(floats, device=device)
        self._arrays = a, b, torch.empty_like(a), ones, torch.empty_like(ones)
        facts = {"side": side, "gemm_flop": 2 * side**3, "copy_bytes": 2 * self._copy_bytes, "device": device}
        return {**facts, "precision": self._precision, "versions": versions("torch")}

    def draw(self, seed: int, images: int) -> Drawn:
        """Seconds of one product, SIDE x SIDE, and of one copy, COPY_BYTES read and as many written; no pictures."""
        import torch

        del seed, images
        a, b, product, source, target = self._arrays
        wait: Callable[[], object] = torch.cuda.synchronize if self._device == "cuda" else lambda: None
        marks = [time.perf_counter()]
        torch.mm(a, b, out=product)
        wait()
        marks.append(time.perf_counter())
        target.copy_(source)
        wait()
        marks.append(time.perf_counter())
        return {"gemm": marks[1] - marks[0], "copy": marks[2] - marks[1]}, []


PAINTERS: Mapping[str, Callable[[Mapping[str, Any]], Painter]] = {
    "bundle": BundlePainter,
    "torch": TorchPainter,
    "compile": TorchPainter,
    "speed": Speed,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the painter that the request names."""
    request = json.loads((sys.argv[1:] if arguments is None else arguments)[0])

    return serve(lambda: PAINTERS[request["kind"]](request))


if __name__ == "__main__":
    sys.exit(main())
