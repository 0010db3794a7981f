"""The torch-free runtime: a bundle and a prompt in, pictures out.

    from hypersd_export.runtime import Pipeline
    Pipeline.from_bundle("bundle")("a red apple", seed=0).images[0].save("apple.png")

Needs NumPy, tokenizers, Pillow, and onnxruntime or TensorRT. Importing this package imports none of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypersd_export.runtime.golden import GoldenReport as GoldenReport
    from hypersd_export.runtime.pipeline import Pipeline as Pipeline
    from hypersd_export.runtime.result import Result as Result

_HOMES = {"GoldenReport": "golden", "Pipeline": "pipeline", "Result": "result"}

__all__ = ["GoldenReport", "Pipeline", "Result"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
