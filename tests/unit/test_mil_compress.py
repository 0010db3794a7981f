"""Compressed weights: every constexpr op against coremltools' own decompression, in iOS 16's forms and in iOS 18's."""

import numpy as np
import pytest
import torch

from hypersd_export.verify.mil import open_package
from tests.mil_programs import evaluate_all, save_program

ct = pytest.importorskip("coremltools")
mb = pytest.importorskip("coremltools.converters.mil").Builder
from coremltools.converters.mil.mil import types  # noqa: E402
from coremltools.converters.mil.mil.ops.defs.iOS16 import constexpr_ops as ios16  # noqa: E402
from coremltools.converters.mil.mil.ops.defs.iOS18 import compression as ios18  # noqa: E402
from coremltools.optimize import coreml as cto  # noqa: E402

SUB_BYTE = {
    "uint1": types.np_uint1_dtype, "uint2": types.np_uint2_dtype, "uint3": types.np_uint3_dtype,
    "uint4": types.np_uint4_dtype, "uint6": types.np_uint6_dtype, "uint8": np.uint8, "int4": types.np_int4_dtype,
    "int8": np.int8,
}  # fmt: skip


def rng(seed=0):
    return np.random.default_rng(seed)


def held(weight, wanted, folder, target):
    """Hold `weight()`, made in a program, against an array: adding 0 brings it out."""
    zero = np.zeros(wanted.shape, dtype=wanted.dtype)
    package = open_package(save_program(lambda a: mb.add(x=a, y=weight()), [zero], folder, target))
    assert any(op.startswith("constexpr_") for op in package.function().op_types())
    result = evaluate_all(package, [zero])[0]
    assert result.dtype == wanted.dtype
    np.testing.assert_allclose(result, wanted, rtol=1e-3 if wanted.dtype == np.float16 else 1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_a_table_of_ios16_with_packed_indices(bits, dtype, tmp_path):
    shape = (3, 5, 7)  # 105 elements: no whole number of bytes
    table = rng().standard_normal(1 << bits).astype(dtype)
    indices = rng(1).integers(0, 1 << bits, 105).astype(np.uint8)
    packed = np.packbits(np.unpackbits(indices[:, None], axis=1, bitorder="little")[:, :bits], bitorder="little")
    wanted = ios16.constexpr_lut_to_dense.decompress(table, packed, np.array(shape))
    np.testing.assert_array_equal(wanted, table[indices].reshape(shape))
    held(
        lambda: mb.constexpr_lut_to_dense(indices=packed, lut=table, shape=np.uint32(shape)), wanted, tmp_path, "iOS16"
    )


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_affine_dequantisation(kind, axis, tmp_path):
    data = rng().integers(-128, 128, (4, 6)).astype(kind)
    count = data.shape[axis]
    scale, zero = rng(1).uniform(0.01, 0.1, count).astype(np.float32), rng(2).integers(0, 9, count).astype(kind)
    per_axis = ios16.constexpr_affine_dequantize.decompress(data, zero, scale, axis)
    held(
        lambda: mb.constexpr_affine_dequantize(quantized_data=data, scale=scale, zero_point=zero, axis=np.int32(axis)),
        per_axis, tmp_path, "iOS16",
    )  # fmt: skip
    whole = ios16.constexpr_affine_dequantize.decompress(data, kind(3), np.float32(0.5), axis)
    held(
        lambda: mb.constexpr_affine_dequantize(
            quantized_data=data, scale=np.float32(0.5), zero_point=kind(3), axis=np.int32(axis)
        ),
        whole, tmp_path, "iOS16",
    )  # fmt: skip


def test_sparse_and_cast_weights_of_ios16(tmp_path):
    mask = rng().integers(0, 2, 35).astype(np.uint8)
    values = rng(1).standard_normal(int(mask.sum())).astype(np.float32)
    packed = np.packbits(mask, bitorder="little")
    wanted = np.zeros(35, dtype=np.float32)
    wanted[mask == 1] = values
    held(
        lambda: mb.constexpr_sparse_to_dense(nonzero_data=values, mask=packed, shape=np.uint32((5, 7))),
        wanted.reshape(5, 7), tmp_path, "iOS16",
    )  # fmt: skip
    half = rng(2).standard_normal((3, 4)).astype(np.float16)
    held(lambda: mb.constexpr_cast(source_val=half, output_dtype="fp32"), half.astype(np.float32), tmp_path, "iOS16")


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("blocks", [(1, 1, 1), (2, 1, 1), (2, 3, 1)])
def test_tables_of_ios18_one_a_block(blocks, bits, tmp_path):
    indices = rng().integers(0, 1 << bits, (4, 6, 5)).astype(SUB_BYTE[f"uint{bits}"])
    tables = rng(1).standard_normal((*blocks, 1 << bits, 1)).astype(np.float32)
    wanted = ios18.constexpr_lut_to_dense.decompress(indices, tables, None)
    held(lambda: mb.constexpr_lut_to_dense(indices=indices, lut=tables), wanted, tmp_path, "iOS18")


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("blocks", [(1, 1), (2, 1), (1, 3)])
def test_tables_of_ios18_with_vectors(blocks, axis, tmp_path):
    indices = rng().integers(0, 4, (4, 6)).astype(SUB_BYTE["uint2"])
    tables = rng(1).standard_normal((*blocks, 4, 2)).astype(np.float32)
    wanted = ios18.constexpr_lut_to_dense.decompress(indices, tables, axis)
    held(
        lambda: mb.constexpr_lut_to_dense(indices=indices, lut=tables, vector_axis=np.int32(axis)),
        wanted, tmp_path, "iOS18",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["int4", "uint4", "int8", "uint8"])
@pytest.mark.parametrize("blocks", [(1, 1), (4, 1), (4, 3)])
def test_blockwise_dequantisation_of_ios18(blocks, kind, tmp_path):
    low, high = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128), "uint8": (0, 256)}[kind]
    data = rng().integers(low, high, (4, 9)).astype(SUB_BYTE[kind])
    scale = rng(1).uniform(0.01, 0.1, blocks).astype(np.float32)
    offset = rng(2).integers(0, 5, blocks).astype(SUB_BYTE[kind])
    for extra in ({}, {"offset": offset}):
        wanted = ios18.constexpr_blockwise_shift_scale.decompress(data, scale, extra.get("offset"))
        held(
            lambda extra=extra: mb.constexpr_blockwise_shift_scale(data=data, scale=scale, **extra),
            wanted, tmp_path, "iOS18",
        )  # fmt: skip


@pytest.mark.parametrize("axis", [0, 1])
def test_sparse_weights_of_ios18_plain_from_tables_and_quantised(axis, tmp_path):
    mask = rng().integers(0, 2, (4, 6)).astype(SUB_BYTE["uint1"])
    count = int(np.count_nonzero(mask))
    values = rng(1).standard_normal(count).astype(np.float32)
    wanted = ios18.constexpr_sparse_to_dense.decompress(values, mask)
    held(lambda: mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask), wanted, tmp_path, "iOS18")

    levels, scale = rng(2).integers(-8, 8, count).astype(SUB_BYTE["int4"]), np.float32([[0.5], [0.25]])
    scale = np.repeat(scale, 2, axis=0)
    wide_mask, dense = ios18.constexpr_sparse_blockwise_shift_scale.decompress(mask, levels, scale, None)

    def quantised():
        inner = mb.constexpr_sparse_blockwise_shift_scale(data_mask=mask, nonzero_data=levels, scale=scale)
        return mb.constexpr_sparse_to_dense(mask=inner[0], nonzero_data=inner[1])

    held(quantised, ios18.constexpr_sparse_to_dense.decompress(dense, wide_mask), tmp_path, "iOS18")

    picks = rng(3).integers(0, 4, count).astype(SUB_BYTE["uint2"])
    for vector in (1, 3):
        table = rng(4).standard_normal((1, 1, 4, vector)).astype(np.float32)
        wide_mask, dense = ios18.constexpr_lut_to_sparse.decompress(mask, picks, table, axis)

        def looked_up(table=table):
            inner = mb.constexpr_lut_to_sparse(
                indices_mask=mask, indices_nonzero_data=picks, lut=table, vector_axis=np.int32(axis)
            )
            return mb.constexpr_sparse_to_dense(mask=inner[0], nonzero_data=inner[1])

        held(looked_up, ios18.constexpr_sparse_to_dense.decompress(dense, wide_mask), tmp_path, "iOS18")


def test_a_table_that_is_itself_quantised(tmp_path):
    indices = rng().integers(0, 4, (4, 6)).astype(SUB_BYTE["uint2"])
    levels, scale = rng(1).integers(-128, 128, (1, 1, 4, 1)).astype(np.int8), np.float32([[[[0.1]]]])
    table = ios18.constexpr_blockwise_shift_scale.decompress(levels, scale, None)

    def weight():
        return mb.constexpr_lut_to_dense(
            indices=indices, lut=mb.constexpr_blockwise_shift_scale(data=levels, scale=scale)
        )

    held(weight, ios18.constexpr_lut_to_dense.decompress(indices, table, None), tmp_path, "iOS18")


@pytest.fixture(scope="module")
def networks():
    """A small fp16 network, converted for iOS 16 and for iOS 18."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(4, 32, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(32, 32, 3, padding=1),
        torch.nn.Flatten(2), torch.nn.Linear(64, 48),
    ).eval()  # fmt: skip
    exported = torch.export.export(net, (torch.randn(1, 4, 8, 8),)).run_decompositions({})
    return {
        target: ct.convert(exported, minimum_deployment_target=getattr(ct.target, target), skip_model_load=True)
        for target in ("iOS16", "iOS18")
    }


def palettised(bits, **options):
    config = cto.OpPalettizerConfig(mode="uniform", nbits=bits, weight_threshold=64, **options)
    return lambda model: cto.palettize_weights(model, cto.OptimizationConfig(global_config=config))


def quantised(**options):
    config = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=64, **options)
    return lambda model: cto.linear_quantize_weights(model, cto.OptimizationConfig(global_config=config))


def pruned(model):
    config = cto.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=64)
    return cto.prune_weights(model, cto.OptimizationConfig(global_config=config))


def pruned_then_palettised(model):
    config = cto.OpPalettizerConfig(mode="uniform", nbits=4, weight_threshold=64)
    return cto.palettize_weights(pruned(model), cto.OptimizationConfig(global_config=config), joint_compression=True)


def pruned_then_quantised(model):
    config = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=64)
    config = cto.OptimizationConfig(global_config=config)
    return cto.linear_quantize_weights(pruned(model), config, joint_compression=True)


@pytest.mark.parametrize(
    ("target", "compress", "op"),
    [
        *(("iOS16", palettised(bits), "constexpr_lut_to_dense") for bits in (2, 4, 6, 8)),
        ("iOS16", quantised(), "constexpr_affine_dequantize"),
        ("iOS16", pruned, "constexpr_sparse_to_dense"),
        ("iOS18", palettised(6), "constexpr_lut_to_dense"),
        ("iOS18", palettised(4, granularity="per_grouped_channel", group_size=8), "constexpr_lut_to_dense"),
        ("iOS18", quantised(), "constexpr_blockwise_shift_scale"),
        ("iOS18", quantised(dtype="int4", granularity="per_block", block_size=16), "constexpr_blockwise_shift_scale"),
        ("iOS18", pruned_then_palettised, "constexpr_lut_to_sparse"),
        ("iOS18", pruned_then_quantised, "constexpr_sparse_blockwise_shift_scale"),
    ],
    ids=["lut2", "lut4", "lut6", "lut8", "int8", "sparse", "lut6-18", "lut4-grouped", "int8-18", "int4-block",
         "sparse-lut", "sparse-int8"],
)  # fmt: skip
def test_a_network_compressed_by_coremltools_is_the_one_that_coremltools_decompresses(
    target, compress, op, networks, tmp_path
):
    small = compress(networks[target])
    full = cto.decompress_weights(small)
    x = rng().standard_normal((1, 4, 8, 8)).astype(np.float32)
    outputs = []
    for name, model in (("small", small), ("full", full)):
        model.save(str(tmp_path / f"{name}.mlpackage"))
        package = open_package(tmp_path / f"{name}.mlpackage")
        assert (op in package.function().op_types()) == (name == "small")
        outputs.append(evaluate_all(package, [x])[0])
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-3 * np.abs(outputs[1]).max())
    plain = tmp_path / "plain.mlpackage"
    networks[target].save(str(plain))
    assert np.abs(evaluate_all(open_package(plain), [x])[0] - outputs[0]).max() > 1e-3  # compression does something
