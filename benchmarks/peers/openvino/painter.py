"""OpenVINO through optimum-intel as a painter for `hypersd-bench`; see ../optimum/painter.py, which it follows."""

import json
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.bench.protocol import serve
from benchmarks.peers.diffusers_like import DiffusersPainter

PACKAGES = ("optimum-intel", "openvino", "diffusers", "transformers", "torch")


class OpenVinoPainter(DiffusersPainter):
    """OVStableDiffusionPipeline on the CPU, compiled for the request's size."""

    def open(self) -> Any:
        """float32 is asked for: OpenVINO's default is bfloat16 where the CPU has it, which is other work."""
        from optimum.intel import OVStableDiffusionPipeline

        config = {
            "INFERENCE_NUM_THREADS": str(self.request["threads"]), "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY", "CACHE_DIR": "",
        }  # fmt: skip
        pipeline = OVStableDiffusionPipeline.from_pretrained(
            self.request["folder"], device="CPU", ov_config=config, compile=False
        )
        pipeline.compile()
        return pipeline

    def facts(self) -> Mapping[str, Any]:
        """Versions."""
        return {"provider": "CPU", "versions": {name: metadata.version(name) for name in PACKAGES}}


def convert(pipeline: Path, out: Path) -> None:
    """`optimum-cli export openvino --library diffusers --weight-format fp32`."""
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    main_export(
        str(pipeline), out, task="text-to-image", library_name="diffusers", ov_config=OVConfig(dtype="fp32")
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        request = json.loads(sys.argv[1])
        sys.exit(serve(lambda: OpenVinoPainter(request)))
