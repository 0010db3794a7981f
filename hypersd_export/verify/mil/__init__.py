"""The MIL interpreter: a saved Core ML package evaluated on any machine, with torch's CPU kernels and no Core ML.

    package = open_package(path)
    outputs = package.evaluate({"sample": …, "timestep": …, "encoder_hidden_states": …}, rounding="fp16")

The package is what is on disk, weights file included; no model in memory has a part in it. Two ways to round:

- "fp16": every value is held in the element type that the program declares: each op computes in float32 and its result
  is rounded to that type. This is the least that half precision costs; a device that also sums in fp16 has more error.
- "fp32": no floating-point value is rounded below float32, so that only the stored weights differ from the original.

Every result's shape is held against the declared one. Constants and compressed weights are read from the mapped file
each time an op needs them, and a value is dropped after its last use. Not imported by the runtime: it needs torch.
"""

from hypersd_export.verify.mil.file import TensorType
from hypersd_export.verify.mil.ops import KERNELS
from hypersd_export.verify.mil.package import Function, Input, Package, open_package
from hypersd_export.verify.mil.run import ROUNDINGS

__all__ = ["KERNELS", "ROUNDINGS", "Function", "Input", "Package", "TensorType", "open_package"]
