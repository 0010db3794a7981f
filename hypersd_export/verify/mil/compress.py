"""MIL kernels of compressed weights: lookup tables, affine and blockwise quantisation, sparse and cast weights.

iOS 16 packs the indices of a lookup table into bytes and gives the shape beside them; iOS 18 has element types of less
than a byte, one table a block, and vectors in the table.
"""

import math

import numpy as np
import torch

from hypersd_export.verify.mil.file import unpack_bits
from hypersd_export.verify.mil.ops import Args, dequantized, kernel

Tensor = torch.Tensor


@kernel("constexpr_lut_to_dense")
def _lut_to_dense(args: Args) -> Tensor:
    if "shape" in args:
        return _one_table(args("indices"), args("lut"), args.integers("shape"))
    return _block_tables(args("indices"), args("lut"), args.integer("vector_axis", -1))


def _one_table(packed: Tensor, table: Tensor, shape: list[int]) -> Tensor:
    """iOS 16: indices packed into bytes, one table of 2, 4, 16, 64 or 256 values."""
    bits = int(math.log2(len(table)))
    if len(table) != 1 << bits:
        raise ValueError(f"a lookup table of {len(table)} values is no power of two")
    indices = unpack_bits(packed.numpy().astype(np.uint8), bits, math.prod(shape))
    return table[torch.from_numpy(indices.astype(np.int64))].reshape(shape)


def _block_tables(indices: Tensor, tables: Tensor, vector_axis: int) -> Tensor:
    """iOS 18: tables [blocks of each axis of indices…, 2^bits, vector]; a vector is laid out along `vector_axis`."""
    rank, entries, vector = indices.ndim, tables.shape[-2], tables.shape[-1]
    if tables.ndim != rank + 2:
        raise ValueError(f"tables of rank {tables.ndim} for indices of rank {rank}")
    block = torch.zeros((), dtype=torch.int64)
    for axis, count in enumerate(tables.shape[:rank]):
        if indices.shape[axis] % count:
            raise ValueError(f"{count} tables along axis {axis}, which has {indices.shape[axis]} elements")
        number = torch.arange(indices.shape[axis]) // (indices.shape[axis] // count)
        block = block * count + number.reshape([-1 if a == axis else 1 for a in range(rank)])
    dense = tables.reshape(-1, vector)[block * entries + indices.long()]
    if vector == 1:
        return dense.squeeze(-1)
    at = vector_axis % rank
    shape = [size * vector if axis == at else size for axis, size in enumerate(indices.shape)]
    return dense.movedim(-1, at + 1).reshape(shape)


@kernel("constexpr_lut_to_sparse")
def _lut_to_sparse(args: Args) -> tuple[Tensor, Tensor]:
    """The mask and the values of a sparse weight; a vector of the table spreads along `vector_axis` in both."""
    mask, table, axis = args("indices_mask"), args("lut"), args.integer("vector_axis", -1)
    dense = _block_tables(_scattered(args("indices_nonzero_data"), mask), table, axis)
    mask = mask.repeat_interleave(table.shape[-1], axis)
    return mask, dense[mask.bool()]


@kernel("constexpr_affine_dequantize")
def _affine_dequantize(args: Args) -> Tensor:
    return dequantized(args, args("quantized_data"))


@kernel("constexpr_blockwise_shift_scale")
def _blockwise_shift_scale(args: Args) -> Tensor:
    return _shift_scale(args, args("data"))


@kernel("constexpr_sparse_blockwise_shift_scale")
def _sparse_shift_scale(args: Args) -> tuple[Tensor, Tensor]:
    """The mask and the values of a sparse weight whose blocks are those of the dense one."""
    mask = args("data_mask")
    return mask, _shift_scale(args, _scattered(args("nonzero_data"), mask))[mask.bool()]


def _shift_scale(args: Args, data: Tensor) -> Tensor:
    """scale (data - offset), one scale and one offset for each block of data."""
    offset = args.maybe("offset")
    shifted = data.float() if offset is None else data.float() - _spread(offset.float(), data)
    return _spread(args("scale"), data) * shifted


def _spread(blocks: Tensor, data: Tensor) -> Tensor:
    """One value a block to one value an element."""
    if blocks.ndim != data.ndim:
        raise ValueError(f"blocks of rank {blocks.ndim} for data of rank {data.ndim}")
    for axis, (count, size) in enumerate(zip(blocks.shape, data.shape, strict=True)):
        if size % count:
            raise ValueError(f"{count} blocks along axis {axis}, which has {size} elements")
        if count not in (1, size):
            blocks = blocks.repeat_interleave(size // count, axis)
    return blocks


@kernel("constexpr_cast")
def _cast(args: Args) -> Tensor:
    return args("source_val")


@kernel("constexpr_sparse_to_dense")
def _sparse_to_dense(args: Args) -> Tensor:
    """The nonzero values in order; a mask of bits, packed (iOS 16, with a shape) or as an element type (iOS 18)."""
    mask = args("mask")
    if "shape" in args:
        shape = args.integers("shape")
        mask = torch.from_numpy(unpack_bits(mask.numpy().astype(np.uint8), 1, math.prod(shape))).reshape(shape)
    return _scattered(args("nonzero_data"), mask)


def _scattered(values: Tensor, mask: Tensor) -> Tensor:
    """The values in order where the mask is not zero, zeros elsewhere."""
    dense = torch.zeros(mask.shape, dtype=values.dtype)
    dense[mask.bool()] = values
    return dense
