"""What do graphs of the published sizes cost to export and to build? `python -m benchmarks.full_size --out DIR`

Random weights, no hub: each network goes through the very functions of the export to an fp16 ONNX file, with `--engine`
to a TensorRT-RTX engine, and with `--coreml` to a Core ML package, one with palettes of 6 bits (the VAE has none), and
two packages whose chain the interpreter holds against the whole. Each step is a process of its own, whose seconds and
peak memory are measured (this one's imports included); one that the machine has no room for is in the report with what
it had reached. Writes full_size.json; the files themselves are deleted, or kept with `--keep`.
"""

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.results import one_line_error, run_module, write_result
from hypersd_export.errors import HypersdError
from hypersd_export.graphs.spec import Component, Graph, Shapes
from hypersd_export.usage import Usage, measure

SD_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
}  # fmt: skip
"""AutoencoderKL as SD 1.x, 2.x and SDXL have it."""
PACKAGES = ("torch", "diffusers", "onnxscript", "tensorrt-rtx", "coremltools")
WHOLE = "network.mlpackage"


def _unet(base: str) -> Callable[[], Graph]:
    def graph() -> Graph:
        from hypersd_export.graphs.components import build_graph
        from trainer.distill.config import recipe
        from trainer.distill.memory import unet_of

        config, given, _ = unet_of(recipe(base))
        channels, height, width = given.latents
        shapes = Shapes(
            batch=1, unet_batch=1, channels=channels, latent_height=height, latent_width=width, vae_scale=8,
            tokens=given.tokens, text_width=given.width, pooled=given.pooled,
        )  # fmt: skip
        return build_graph(Component.UNET, random_weights("UNet2DConditionModel", config), shapes)

    return graph


def _decoder(side: int) -> Callable[[], Graph]:
    def graph() -> Graph:
        from hypersd_export.graphs.components import build_graph

        shapes = Shapes(
            batch=1, unet_batch=1, channels=4, latent_height=side, latent_width=side, vae_scale=8, tokens=77,
            text_width=768,
        )  # fmt: skip
        return build_graph(Component.VAE_DECODER, random_weights("AutoencoderKL", SD_VAE), shapes)

    return graph


NETWORKS: Mapping[str, Callable[[], Graph]] = {
    "sd15-unet": _unet("sd15"),
    "sd15-vae-decoder": _decoder(64),
    "sdxl-unet": _unet("sdxl"),
}


def random_weights(kind: str, config: Mapping[str, Any]) -> Any:
    """A diffusers model of class `kind` with small normal weights in fp16; no float32 copy is ever made."""
    import diffusers
    import torch
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = getattr(diffusers, kind)(**{n: tuple(v) if isinstance(v, list) else v for n, v in config.items()})
    model = model.half().to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.02, generator=generator)
    return model


def export(name: str, folder: Path) -> dict[str, Any]:
    """The fp16 ONNX of a network, into `folder`: seconds, peak MB of this process, MB of weights."""
    from hypersd_export.targets import onnx_fp16

    with measure() as usage:
        built = onnx_fp16.build(NETWORKS[name](), folder)
    return _cost(usage) | {"nodes": built["nodes"], "weights_mb": round(built["weight_bytes"] / 1e6, 1)}


def engine(name: str, folder: Path, capabilities: Sequence[str]) -> dict[str, Any]:
    """The TensorRT-RTX engine of the ONNX in `folder`: seconds and peak MB of its process, MB of the file."""
    from hypersd_export.targets import tensorrt
    from hypersd_export.targets.onnx import MODEL_FILE

    options, _ = tensorrt.resolve(flavour="rtx", capabilities=capabilities)
    record = tensorrt.build(folder / MODEL_FILE, folder, component=name, options=options)
    return {"seconds": record.seconds, "peak_mb": round(record.peak_mb), "engine_mb": round(record.bytes / 1e6, 1)}


def package(name: str, folder: Path) -> dict[str, Any]:
    """The fp16 Core ML package of a network, into `folder`, its module in float32 as the export loads it."""
    from hypersd_export.targets.coreml import convert

    with measure() as usage:
        graph = NETWORKS[name]()
        for weight in graph.module.parameters():
            weight.data = weight.data.float()  # one at a time
        graph = replace(graph, inputs={each: value.float() for each, value in graph.inputs.items()})
        built = convert.build(convert.plain(graph), folder / WHOLE, precision="fp16", deployment_target="iOS17")
    return _cost(usage) | {"ops": built["ops"], "package_mb": round(built["bytes"] / 1e6, 1)}


def palettes(name: str, folder: Path) -> dict[str, Any]:
    """The same package with palettes of 6 bits."""
    del name
    from hypersd_export.targets.coreml import palettize

    with measure() as usage:
        built = palettize.build(folder / WHOLE, folder / "small.mlpackage", bits=6, deployment_target="iOS17")
    return _cost(usage) | {"package_mb": round(built["bytes"] / 1e6, 1)}


def chunks(name: str, folder: Path) -> dict[str, Any]:
    """The same package in two; and how far their chain is from the whole by the interpreter, on seeded inputs."""
    del name
    import numpy as np

    from hypersd_export.runtime.chain import chained
    from hypersd_export.targets.coreml import chunk
    from hypersd_export.verify.coreml import InterpretedGraph
    from hypersd_export.verify.metrics import max_abs, psnr, reported
    from hypersd_export.verify.mil import open_package

    pieces = folder / "first.mlpackage", folder / "second.mlpackage"
    with measure() as usage:
        built = chunk.build(folder / WHOLE, *pieces)
    whole, chain = (
        chained(tuple(InterpretedGraph(package=open_package(path)) for path in paths))
        for paths in ((folder / WHOLE,), pieces)
    )
    rng = np.random.default_rng(0)
    feeds = {each: rng.standard_normal([size or 1 for size in tensor.shape]) for each, tensor in whole.inputs.items()}
    (expected,), (found,) = (graph.run(**feeds).values() for graph in (whole, chain))
    return _cost(usage) | {
        "packages_mb": [round(each["bytes"] / 1e6, 1) for each in built["chunks"]],
        "psnr_db": round(reported(psnr(found, expected)), 1),
        "max_abs": max_abs(found, expected),
        "largest": float(np.abs(expected).max()),
    }


def _cost(usage: Usage) -> dict[str, Any]:
    return {"seconds": round(usage.seconds, 1), "peak_mb": round(usage.peak_mb)}


COREML = {"coreml": package, "coreml 6 bits": palettes, "coreml in two": chunks}
"""The steps of `--coreml`, which follow on each other."""


def _in_process(step: str, name: str, folder: Path, capabilities: str) -> dict[str, Any]:
    """A step in a process of its own; its figures, or the error and the peak of the process tree till then."""
    command = ["benchmarks.full_size", "--worker", step, "--only", name, "--out", str(folder),
               "--compute-capability", capabilities]  # fmt: skip
    try:
        with measure() as usage:
            said = run_module(command)
    except HypersdError as error:
        return {"error": str(error), "peak_mb": round(usage.peak_mb)}
    result: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all that is asked, and write the report: 0 if every step came to its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder with room for the files")
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--engine", action="store_true", help="build TensorRT-RTX engines too")
    parser.add_argument("--coreml", action="store_true", help="make Core ML packages too")
    parser.add_argument("--compute-capability", default="8.6,8.9")
    parser.add_argument("--keep", action="store_true", help="leave the files in --out")
    parser.add_argument("--worker", choices=("export", "engine", *COREML), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return _worker(options)
    rows: dict[str, dict[str, Any]] = {}
    for name in options.only:
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        rows[name] = {"export": _in_process("export", name, folder, options.compute_capability)}
        if options.engine and "error" not in rows[name]["export"]:
            rows[name]["engine"] = _in_process("engine", name, folder, options.compute_capability)
        for step in COREML if options.coreml else ():
            rows[name][step] = _in_process(step, name, folder, options.compute_capability)
            if "error" in rows[name][step]:
                break
        print(json.dumps({name: rows[name]}), flush=True)
        if not options.keep:
            shutil.rmtree(folder)
    result = {
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": {package: version(package) for package in PACKAGES},
        "compute_capability": options.compute_capability,
        "networks": rows,
    }
    write_result(options.out, "full_size", result)
    return int(any("error" in step for row in rows.values() for step in row.values()))


def _worker(options: argparse.Namespace) -> int:
    (name,) = options.only
    with one_line_error() as ended:
        if options.worker == "export":
            found = export(name, options.out)
        elif options.worker in COREML:
            found = COREML[options.worker](name, options.out)
        else:
            found = engine(name, options.out, options.compute_capability.split(","))
        print(json.dumps(found))
    return ended.code


if __name__ == "__main__":
    sys.exit(main())
