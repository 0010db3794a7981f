"""A graph with bound buffers: what is the same at every call is copied to the device once, and nothing is allocated.

Every input and every output has a buffer of its own. Optimum binds the UNet's output onto its input's, and where a
plan has no guidance that input is the latents which the step still needs: every picture is garbage there. With buffers
that stay where they are a call can be a CUDA graph too, which onnxruntime then captures at the first one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hypersd_export.errors import BundleError
from hypersd_export.runtime.graph import Array, Tensor, as_input, first_line

DEVICES = {"cuda": "cuda", "tensorrt": "cuda", "directml": "dml", "migraphx": "cuda", "cpu": "cpu"}
"""By our name of a provider, where onnxruntime keeps its buffers; for those that are not here it binds none."""


@dataclass(kw_only=True)
class BoundGraph:
    """Buffers for all inputs and outputs of a session of fixed shapes; call it with the inputs that change.

    Results are copies. `where` is for messages.
    """

    session: Any
    where: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    device: str
    values: dict[str, Any] = field(default_factory=dict)
    """The buffers by name, of inputs and outputs."""
    _binding: Any = None

    def __post_init__(self) -> None:
        from onnxruntime import OrtValue

        self._binding = self.session.io_binding()
        for names, bind in ((self.inputs, "bind_ortvalue_input"), (self.outputs, "bind_ortvalue_output")):
            for name, tensor in names.items():
                shape = [int(size) for size in tensor.shape if size is not None]
                self.values[name] = OrtValue.ortvalue_from_shape_and_type(shape, tensor.dtype, self.device, 0)
                getattr(self._binding, bind)(name, self.values[name])

    def set(self, feeds: Mapping[str, npt.ArrayLike]) -> None:
        """Copy these inputs into their buffers.

        Raises:
            BundleError: an input that there is not, or one of another shape.
        """
        for name, value in feeds.items():
            if name not in self.inputs:
                raise BundleError(f"{self.where} failed: it has no input {name!r}")
            array, shape = as_input(value, self.inputs[name]), self.inputs[name].shape
            if array.shape != shape:
                raise BundleError(f"{self.where} failed: {name} of shape {list(array.shape)}, wanted {list(shape)}")
            self.values[name].update_inplace(np.ascontiguousarray(array))

    def __call__(self, **feeds: npt.ArrayLike) -> dict[str, Array]:
        """Evaluate with these inputs and those that were set before; BundleError as `set`, or if it fails inside."""
        self.set(feeds)
        try:
            self.session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's own types, which share no base class
            raise BundleError(f"{self.where} failed: {first_line(error)}") from error
        return {name: np.array(self.values[name].numpy()) for name in self.outputs}


def can_bind(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], provider: str) -> bool:
    """Whether all shapes are fixed, and the provider has a memory that buffers can be kept in."""
    return provider in DEVICES and not any(None in t.shape for t in (*inputs.values(), *outputs.values()))
