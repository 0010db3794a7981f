"""How much arithmetic a UNet is, and how near a measured time comes to what the machine can do."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypersd_export.bundle.manifest import Manifest
from hypersd_export.errors import MissingBackend
from hypersd_export.runtime.folder import Folder


def unet_work(bundle: Path, manifest: Manifest) -> dict[str, Any]:
    """Of a bundle's UNet: floating-point operations for one row of latents (a multiply-add is two) and parameters,
    counted on the meta device, so without memory; `reason` where that cannot be done."""
    shapes = manifest.options.get("shapes")
    if shapes is None:
        return {"reason": "the manifest does not say the shapes"}
    try:
        return count(Folder(bundle).config("unet"), shapes)
    except MissingBackend as error:
        return {"reason": str(error)}


def count(config: Mapping[str, Any], shapes: Mapping[str, int]) -> dict[str, int]:
    """Of a diffusers UNet2DConditionModel with this config; see `hypersd_export.graphs.spec.Shapes`."""
    try:
        import torch
        from diffusers import UNet2DConditionModel
        from torch.utils.flop_counter import FlopCounterMode
    except ModuleNotFoundError as error:
        raise MissingBackend(str(error.name), "bench", "counting the UNet's work") from error
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config)).eval()
        sample = torch.empty(1, shapes["channels"], shapes["latent_height"], shapes["latent_width"])
        states = torch.empty(1, shapes["tokens"], shapes["text_width"])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(sample, torch.empty(()), states)
    parameters = sum(weight.numel() for weight in unet.parameters())
    return {"flop": int(counter.get_total_flops()), "parameters": parameters}


def roofline(
    work: Mapping[str, Any], *, steps: int, rows: int, unet_s: float, flop_per_s: float, copy_bytes_per_s: float,
    bytes_each: int,
) -> dict[str, float]:  # fmt: skip
    """The roofline (Williams et al. 2009) of a UNet that took `unet_s` for `steps` calls on `rows` rows each.

    gflop: of all calls. of_gemm: its arithmetic per second over the measured matrix product's. roof_s: the least time
    that the machine could need, by arithmetic or by reading the weights (`bytes_each` a parameter) once a call,
    whichever is longer; of_roof: that over the measured time.
    """
    flop = rows * work["flop"]
    roof = steps * max(flop / flop_per_s, work["parameters"] * bytes_each / copy_bytes_per_s)
    achieved = steps * flop / unet_s
    return {
        "gflop": steps * flop / 1e9, "gflop_per_s": achieved / 1e9, "of_gemm": achieved / flop_per_s, "roof_s": roof,
        "of_roof": roof / unet_s,
    }  # fmt: skip
