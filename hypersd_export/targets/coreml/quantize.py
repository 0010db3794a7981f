"""Weights as integers and scales: int8 with a scale for each output channel, int4 with one for each block of inputs.

Linear and symmetric: a weight is scale * q, with q from -127 to 127 (-7 to 7). Where palettes put their values as the
weights lie, these are evenly spaced; in return a device need not look anything up.
"""

from pathlib import Path
from typing import Any

from hypersd_export.targets.coreml import GENERATIONS, QUANTIZED, package, vendor
from hypersd_export.targets.coreml.palettize import weights

BLOCK_SIZE = 32
"""Inputs that share a scale at less than 8 bits, where that divides their number; else an output channel has one."""


def build(source: Path, path: Path, *, form: str, deployment_target: str) -> dict[str, Any]:
    """Write the package `source` with the weights of its convolutions and linear layers as integers, as `path`.

    form: a key of `QUANTIZED` that the deployment target stores. The same weights as `palettize.build` takes. Returns
    what the manifest says: the package's figures, and how much became integers.
    """
    assert GENERATIONS[deployment_target] >= QUANTIZED[form], "checked with the options"
    shapes = weights(vendor.read_model(source / package.MODEL_FILE))
    blocks = {name: _block(form, shape) for name, shape in shapes.items()}
    with package.loaded(source, path.parent) as model:
        package.save(vendor.quantize(model, form, blocks), path)
    figures = {
        "form": form, "weights": len(shapes), "blocks": sum(block is not None for block in blocks.values()),
    }  # fmt: skip
    return {**package.facts(path), "bytes_before": package.facts(source)["bytes"], "integers": figures}


def _block(form: str, shape: tuple[int, ...]) -> int | None:
    return BLOCK_SIZE if form == "int4" and shape[1] % BLOCK_SIZE == 0 else None
