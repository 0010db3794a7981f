"""MIL programs for the interpreter's tests: made with coremltools' builder, not optimised, saved, and read back."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hypersd_export.verify.mil import Package, open_package


def save_program(
    body: Callable[..., Any], inputs: Sequence[np.ndarray], folder: Path, target: str = "iOS16", name: str = "p"
) -> Path:
    """Save a package whose only function is `body` of arrays like `inputs`, in their dtypes."""
    import coremltools as ct
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import types

    kinds = {np.dtype(np.float16): types.fp16, np.dtype(np.float32): types.fp32, np.dtype(np.int32): types.int32}
    specs = [Builder.TensorSpec(shape=value.shape, dtype=kinds[value.dtype]) for value in inputs]
    names = ", ".join(f"x{number}" for number in range(len(inputs)))
    function = eval(f"lambda {names}: body({names})", {"body": body})  # the builder reads the parameters' names
    opset = getattr(ct.target, target)
    model = ct.convert(
        Builder.program(input_specs=specs, opset_version=opset)(function), convert_to="mlprogram",
        minimum_deployment_target=opset, compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY, skip_model_load=True,
    )  # fmt: skip
    path = folder / f"{name}.mlpackage"
    shutil.rmtree(path, ignore_errors=True)
    model.save(str(path))
    return path


def evaluate_all(package: Package, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs in order, for inputs in order."""
    feed = dict(zip(package.function().inputs, inputs, strict=True))
    return list(package.evaluate(feed).values())


def run(
    body: Callable[..., Any], inputs: Sequence[np.ndarray], folder: Path, target: str = "iOS16"
) -> list[np.ndarray]:
    """The outputs of `body`'s program, in order."""
    return evaluate_all(open_package(save_program(body, inputs, folder, target)), inputs)
