"""The parity gates: how close an artifact must be to torch, and the figures of one component against its gate."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from hypersd_export.graphs.spec import COMPRESSIBLE
from hypersd_export.verify.metrics import max_abs, psnr, reported

COMPONENT_DB = {"fp32": 90.0, "fp16": 40.0}
"""Least PSNR of each component's outputs, by precision. In float32 onnxruntime on a CPU gives 132 to 146 dB; a GELU of
the wrong kind, a forgotten convolution or half precision inside gives less than 80. fp16, rounded op by op on a CPU,
gives 71 to 82 dB on the built-in model with each of its LoRAs; an overflow gives no number at all. Core ML's packages,
through the interpreter, give 110 to 139 dB and 73 to 82 dB there (docs/mil.md)."""
IMAGE_DB = {"fp32": 50.0, "fp16": 35.0}
"""Least PSNR of the final 8-bit image, by precision; also the golden image's, for every other runtime."""
COREML_IMAGE_DB = {"fp32": 60.0, "fp16": 35.0}
"""The same for Core ML's packages as the interpreter (`verify/mil`) draws with them."""
IMAGE = "image"
LOSSY_DB: Mapping[str, float] = {**{component.value: 15.0 for component in COMPRESSIBLE}, IMAGE: 0.0}
"""The same where weights are compressed: what is lost was asked for, but not an error as large as the values (10 to 14
dB). On the built-in model int8 gives 56 dB in the UNet, int4 33, palettes of 2 bits 23; and their pictures 42, 20, 10.
The VAE's weights are never compressed, so that its gates stay as they are."""


@dataclass(slots=True)
class Gate:
    """The comparisons of one component: the worst of each figure counts."""

    name: str
    least_db: float
    psnr_db: float = float("inf")
    max_abs: float = 0.0
    steps: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def compare(self, result: npt.ArrayLike, reference: npt.ArrayLike, what: str) -> tuple[float, float]:
        """Hold one output against torch's; returns (PSNR in dB, largest difference) as reported."""
        db, largest = reported(psnr(result, reference)), max_abs(result, reference)
        if not largest >= 0.0:  # NaN
            largest = float("inf")
        self.psnr_db = min(self.psnr_db, db)
        self.max_abs = max(self.max_abs, largest)
        if not db >= self.least_db:
            self.failures.append(f"{self.name} {db:.1f} dB {what} (needs {self.least_db:g})")
        return db, largest

    def refuse(self, why: str) -> None:
        """A failure that is not a matter of decibels."""
        self.psnr_db = reported(float("-inf"))
        self.failures.append(f"{self.name} {why}")

    def to_json(self) -> dict[str, Any]:
        """The figures for the manifest; an infinite difference is given as the largest float32."""
        figures: dict[str, Any] = {
            "psnr_db": round(reported(self.psnr_db), 2),
            "max_abs": finite(self.max_abs),
            "least_db": self.least_db,
        }
        if self.steps:
            figures["per_step"] = self.steps
        return figures


def finite(value: float) -> float:
    """A figure that JSON can hold."""
    return min(value, 3.4e38)
