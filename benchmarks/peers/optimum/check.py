"""Load a bundle in optimum-onnx's ORTStableDiffusion(XL)Pipeline and compare its picture with the golden image.

Runs in the peer's own environment (see ../README.md), so it imports nothing of this project. Prints one JSON line:
{"psnr_db": without IO binding, "psnr_db_io_binding": with it, "max_abs_latents_io_binding": …}.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def draw(bundle: Path, golden: dict[str, Any], *, io_binding: bool) -> Image.Image:
    """The golden prompt's picture, from the golden noise, by the bundle's own scheduler."""
    from optimum import onnxruntime

    name = json.loads((bundle / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(onnxruntime, f"ORT{name}").from_pretrained(
        bundle, provider="CPUExecutionProvider", use_io_binding=io_binding
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = np.load(bundle / "golden" / "initial_noise.npy")
    guidance = golden["guidance"] or 0.0
    images = pipeline(
        golden["prompt"],
        negative_prompt=golden["negative_prompt"] or None,
        latents=torch.from_numpy(noise.reshape(1, *noise.shape[-3:]).copy()),
        num_inference_steps=golden["steps"],
        guidance_scale=guidance,
    ).images
    return images[0]


def psnr(a: Image.Image, b: Image.Image) -> float:
    """PSNR in dB of two 8-bit pictures; 100 where they are equal."""
    mse = np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean()
    return 100.0 if mse == 0 else float(10 * np.log10(255**2 / mse))


def main() -> None:
    """Parse, draw twice, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    bundle = parser.parse_args().bundle
    golden = json.loads((bundle / "golden" / "golden.json").read_text())
    expected = Image.open(bundle / "golden" / golden["expected"]).convert("RGB")
    result = {
        "steps": golden["steps"],
        "guidance": golden["guidance"],
        "psnr_db": psnr(draw(bundle, golden, io_binding=False), expected),
        "psnr_db_io_binding": psnr(draw(bundle, golden, io_binding=True), expected),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
