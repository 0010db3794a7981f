"""coremltools, and nothing else of it: converting a program, compressing weights, reading and writing a package.

coremltools converts and writes packages on Linux too; it predicts on a Mac alone. Everything is imported inside.
"""

import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypersd_export.errors import BuildError, MissingBackend

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch.export import ExportedProgram

NAME, EXTRA = "coremltools", "coreml"
Palette = Callable[["npt.NDArray[np.floating[Any]]"], "tuple[npt.NDArray[Any], npt.NDArray[Any]]"]
"""Weights to (the 2^bits values that stand for them, the index of each one's)."""


def version() -> str:
    """coremltools' version, for cache keys and the manifest; nothing is imported. Raises `MissingBackend`."""
    if importlib.util.find_spec(NAME) is None:
        raise MissingBackend(NAME, EXTRA, "--target coreml")
    return importlib.metadata.version(NAME)


def _coremltools() -> Any:
    try:
        # Its notes are about versions of torch and about not being on a Mac.
        logging.getLogger(NAME).setLevel(logging.ERROR)
        import coremltools
    except ModuleNotFoundError as error:
        raise MissingBackend(str(error.name), EXTRA, "--target coreml") from error
    return coremltools


def convert(
    program: "ExportedProgram", *, outputs: Sequence[str], deployment_target: str, precision: str,
    keeps_float32: Callable[[Any], bool], picture: str | None = None,
) -> Any:  # fmt: skip
    """An exported program as a coremltools model, not loaded.

    outputs: names, in the program's order; all are float32, or, if it is `picture`, an RGB image. precision: "fp16"
    computes in half but for the MIL ops for which `keeps_float32(op)`, which is asked in the order of the program.
    Raises `BuildError` for a program that coremltools does not take.
    """
    ct = _coremltools()
    import numpy as np

    half = ct.transform.FP16ComputePrecision(op_selector=lambda op: not keeps_float32(op))
    try:
        return ct.convert(
            program,
            convert_to="mlprogram",
            outputs=[
                ct.ImageType(name=name, color_layout=ct.colorlayout.RGB) if name == picture
                else ct.TensorType(name=name, dtype=np.float32)
                for name in outputs
            ],
            minimum_deployment_target=getattr(ct.target, deployment_target),
            compute_precision=half if precision == "fp16" else ct.precision.FLOAT32,
            skip_model_load=True,
        )  # fmt: skip
    except (ValueError, RuntimeError, NotImplementedError, TypeError, KeyError, AssertionError) as error:
        raise BuildError(f"coremltools does not take the graph: {' '.join(str(error).split())[:300]}") from error


def load(path: Path) -> Any:
    """A package as a coremltools model that cannot predict."""
    return _coremltools().models.MLModel(str(path), skip_model_load=True)


def palettize(model: Any, palettes: Mapping[str, tuple[Palette, int | None]]) -> Any:
    """The model with the weights of these names as palettes and indices.

    With a group size beside its palette each so many output channels, on axis 0, of a weight have a palette of their
    own (from iOS 18 on).
    """
    _coremltools()
    import coremltools.optimize.coreml as optimize

    def config(palette: Palette, size: int | None) -> Any:
        grain = {} if size is None else {"granularity": "per_grouped_channel", "group_size": size, "channel_axis": 0}
        return optimize.OpPalettizerConfig(mode="custom", lut_function=palette, weight_threshold=0, **grain)

    configs = {name: config(*given) for name, given in palettes.items()}
    return optimize.palettize_weights(model, optimize.OptimizationConfig(op_name_configs=configs))


def quantize(model: Any, form: str, block_sizes: Mapping[str, int | None]) -> Any:
    """The model with the weights of these names as integers ("int8" or "int4") and scales, symmetric about 0.

    With a block size each so many inputs of an output channel have a scale of their own (from iOS 18 on), else each
    output channel has one.
    """
    _coremltools()
    import coremltools.optimize.coreml as optimize

    def config(size: int | None) -> Any:
        grain = {"granularity": "per_channel"} if size is None else {"granularity": "per_block", "block_size": size}
        return optimize.OpLinearQuantizerConfig(mode="linear_symmetric", dtype=form, weight_threshold=0, **grain)

    configs = {name: config(size) for name, size in block_sizes.items()}
    return optimize.linear_quantize_weights(model, optimize.OptimizationConfig(op_name_configs=configs))


def merge(sources: Mapping[str, Path], path: Path) -> None:
    """Write a package with a function of each of these names, the main one of the package there; weights that are the
    same stand there once. The first is the default."""
    utils = _coremltools().models.utils
    described = utils.MultiFunctionDescriptor()
    for name, source in sources.items():
        described.add_function(str(source), "main", name)
    described.default_function_name = next(iter(sources))
    utils.save_multifunction(described, str(path))


def read_model(path: Path) -> Any:
    """The protobuf of a `model.mlmodel`; its weights are in another file."""
    _coremltools()
    from coremltools.proto import Model_pb2

    return Model_pb2.Model.FromString(path.read_bytes())
