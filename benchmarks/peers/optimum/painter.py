"""optimum-onnx as a painter for `hypersd-bench`: its own export of a diffusers folder, run by its own pipeline.

    painter.py convert PIPELINE OUT     PIPELINE REQUEST      (in .venv-peers/optimum, see ../README.md)

Of this project only what needs no more than NumPy is imported: the protocol and the noise.
"""

import json
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.bench.protocol import serve
from benchmarks.peers.diffusers_like import DiffusersPainter

PACKAGES = ("optimum-onnx", "onnxruntime", "diffusers", "transformers", "torch")


class OptimumPainter(DiffusersPainter):
    """ORTStableDiffusionPipeline on the CPU provider."""

    def open(self) -> Any:
        """IO binding off: with it the latents of a pipeline without guidance are overwritten (see ../README.md)."""
        import onnxruntime
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.request["threads"]
        return ORTStableDiffusionPipeline.from_pretrained(
            self.request["folder"], provider="CPUExecutionProvider", session_options=options, use_io_binding=False
        )

    def facts(self) -> Mapping[str, Any]:
        """Versions."""
        return {"provider": "cpu", "versions": {name: metadata.version(name) for name in PACKAGES}}


def convert(pipeline: Path, out: Path) -> None:
    """`optimum-cli export onnx --library diffusers`, without its own comparison."""
    from optimum.exporters.onnx import main_export

    main_export(str(pipeline), out, task="text-to-image", library_name="diffusers", do_validation=False)


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        request = json.loads(sys.argv[1])
        sys.exit(serve(lambda: OptimumPainter(request)))
