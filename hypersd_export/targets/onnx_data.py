"""Weights in a file beside the graph: written once, to two places at once and hashed, if that is asked for.

A disk takes gigabytes as fast as one core hands them over, and so does SHA-256. What is written for the cache is
therefore written for the bundle too, and digested, while it is at hand: copying and reading it again would take twice
the time. (A second name for one file, which would cost nothing, is refused by onnx as an attack.)
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir

EXTERNAL_TENSOR_BYTES = 1024
"""Smaller weights stay in the graph."""


@contextmanager
def weights_in(
    model: "onnx_ir.Model", path: Path, *, also: Sequence[Path], told: "Callable[[onnx_ir.TensorProtocol], None]"
) -> Iterator[str]:
    """Write the weights into the new file `path`, in the graph's order, and the same into each of `also`; gives the
    file's SHA-256 in hex. In the body they are in that file, to the model; afterwards as they were.

    `told` is called with each tensor before it is read.
    """
    values = [
        value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes > EXTERNAL_TENSOR_BYTES
    ]
    tensors = [value.const_value for value in values]
    digest = hashlib.sha256()
    places = _write(tensors, (path, *also), digest.update, told)
    try:
        for value, place in zip(values, places, strict=True):
            value.const_value = place
        yield digest.hexdigest()
    finally:
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = tensor


def _write(
    tensors: "Sequence[onnx_ir.TensorProtocol | None]",
    paths: Sequence[Path],
    hashed: Callable[[memoryview], None],
    told: "Callable[[onnx_ir.TensorProtocol], None]",
) -> "list[onnx_ir.ExternalTensor]":
    """Where each tensor is in the file. Files and hash take one side by side, while the next one is laid out: all of
    them leave Python meanwhile."""
    import onnx_ir

    places, offset = [], 0
    running: list[Future[None]] = []
    with ExitStack() as end:
        sinks = [hashed]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = end.enter_context(path.open("wb", buffering=0)).fileno()
            sinks.append(functools.partial(_write_all, descriptor))
        threads = end.enter_context(ThreadPoolExecutor(len(sinks)))
        for tensor in tensors:
            assert tensor is not None
            told(tensor)
            data = _bytes(tensor)
            for done in running:
                done.result()
            running = [threads.submit(sink, data) for sink in sinks]
            shape, size = onnx_ir.Shape(tensor.shape), data.nbytes
            place = onnx_ir.ExternalTensor(
                paths[0].name, offset, size, tensor.dtype, shape=shape, name=tensor.name or "", base_dir=paths[0].parent
            )
            places.append(place)
            offset += size
        for done in running:
            done.result()
    return places


def _write_all(descriptor: int, data: memoryview) -> None:
    """One call of write(2) takes 2 GB at most."""
    while data:
        data = data[os.write(descriptor, data) :]


def _bytes(tensor: "onnx_ir.TensorProtocol") -> memoryview:
    """A tensor's bytes in ONNX's order, without a copy where it has them as they are."""
    import numpy as np

    array = tensor.numpy()
    if array.dtype.isnative and array.dtype.itemsize * 8 == tensor.dtype.bitwidth:
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return memoryview(tensor.tobytes())  # such as integers of four bits, two in a byte
