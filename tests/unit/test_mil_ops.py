"""verify/mil: every op against a twin in torch or NumPy, or coremltools' own reference, over shapes and types.

The programs are made with coremltools' builder, saved and read back: what is tested is what a package holds.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hypersd_export.verify.mil import KERNELS
from tests.mil_programs import run

ct = pytest.importorskip("coremltools")
mb = pytest.importorskip("coremltools.converters.mil").Builder

SHAPES = [(2, 3, 4), (1, 5), (2, 4, 6, 8)]
DTYPES = [np.float16, np.float32]
TOLERANCE = {np.float16: 4e-3, np.float32: 2e-6}


def rng(seed=0):
    return np.random.default_rng(seed)


UNARY = {
    "abs": torch.abs, "acos": torch.acos, "asin": torch.asin, "atan": torch.atan, "atanh": torch.atanh,
    "ceil": torch.ceil, "cos": torch.cos, "cosh": torch.cosh, "erf": torch.erf, "exp": torch.exp, "exp2": torch.exp2,
    "floor": torch.floor, "round": torch.round, "sign": torch.sign, "sin": torch.sin, "sinh": torch.sinh,
    "sqrt": torch.sqrt, "square": torch.square, "tan": torch.tan, "tanh": torch.tanh, "relu": torch.relu,
    "relu6": F.relu6, "sigmoid": torch.sigmoid, "silu": F.silu, "softplus": F.softplus, "softsign": F.softsign,
    "log": lambda x: torch.log(x + 1e-45), "rsqrt": torch.rsqrt, "inverse": lambda x: 1 / (x + 1e-4),
    "gelu": F.gelu,
}  # fmt: skip
BINARY = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "real_div": torch.div, "floor_div": torch.floor_divide,
    "mod": torch.remainder, "pow": torch.pow, "maximum": torch.maximum, "minimum": torch.minimum,
}  # fmt: skip
COMPARE = {
    "equal": np.equal, "not_equal": np.not_equal, "greater": np.greater, "greater_equal": np.greater_equal,
    "less": np.less, "less_equal": np.less_equal,
}  # fmt: skip
LOGICAL = {"logical_and": np.logical_and, "logical_or": np.logical_or, "logical_xor": np.logical_xor}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_elementwise_ops_are_torchs_rounded_to_the_programs_type(shape, dtype, tmp_path):
    x = rng().uniform(0.05, 0.95, shape).astype(dtype)
    y = rng(1).uniform(0.5, 2.0, shape[-1:]).astype(dtype)

    def body(a, b):
        return (*(getattr(mb, name)(x=a) for name in UNARY), *(getattr(mb, name)(x=a, y=b) for name in BINARY))

    results = run(body, [x, y], tmp_path)
    wide, other = torch.from_numpy(x).float(), torch.from_numpy(y).float()
    expected = [*(f(wide) for f in UNARY.values()), *(f(wide, other) for f in BINARY.values())]
    for name, result, wanted in zip([*UNARY, *BINARY], results, expected, strict=True):
        assert result.dtype == dtype, name
        np.testing.assert_array_equal(result, wanted.numpy().astype(dtype), err_msg=name)


def test_comparisons_and_logic_and_select(tmp_path):
    x, y = (rng(seed).integers(0, 3, (4, 5)).astype(np.float32) for seed in (0, 1))

    def body(a, b):
        small, other = mb.less(x=a, y=b), mb.equal(x=a, y=1.0)
        flags = [getattr(mb, name)(x=a, y=b) for name in COMPARE]
        flags += [getattr(mb, name)(x=small, y=other) for name in LOGICAL]
        flags += [mb.logical_not(x=small)]
        return (*(mb.cast(x=flag, dtype="int32") for flag in flags), mb.select(cond=small, a=a, b=b))

    *flags, chosen = run(body, [x, y], tmp_path)
    wanted = [f(x, y) for f in COMPARE.values()] + [f(x < y, x == 1) for f in LOGICAL.values()] + [~(x < y)]
    for result, expected in zip(flags, wanted, strict=True):
        np.testing.assert_array_equal(result, expected.astype(np.int32))
    np.testing.assert_array_equal(chosen, np.where(x < y, x, y))


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_with_parameters(dtype, tmp_path):
    x = (rng().standard_normal((2, 3, 4, 5)) * 3).astype(dtype)
    alpha = np.array([0.1, 0.2, 0.5], dtype=dtype)
    c = dtype
    cases = {
        "clip": (lambda a: mb.clip(x=a, alpha=c(-1), beta=c(0.5)), lambda t: t.clamp(-1, 0.5)),
        "threshold": (lambda a: mb.threshold(x=a, alpha=c(0.25)), lambda t: t.clamp(min=0.25)),
        "leaky_relu": (lambda a: mb.leaky_relu(x=a, alpha=c(0.25)), lambda t: F.leaky_relu(t, 0.25)),
        "elu": (lambda a: mb.elu(x=a, alpha=c(0.5)), lambda t: F.elu(t, 0.5)),
        "prelu": (lambda a: mb.prelu(x=a, alpha=alpha), lambda t: F.prelu(t, torch.from_numpy(alpha).float())),
        "sigmoid_hard": (
            lambda a: mb.sigmoid_hard(x=a, alpha=c(0.25), beta=c(0.5)), lambda t: (0.25 * t + 0.5).clamp(0, 1),
        ),
        "scaled_tanh": (lambda a: mb.scaled_tanh(x=a, alpha=c(2), beta=c(0.5)), lambda t: 2 * torch.tanh(0.5 * t)),
        "linear_activation": (lambda a: mb.linear_activation(x=a, alpha=c(2), beta=c(0.5)), lambda t: 2 * t + 0.5),
        "clamped_relu": (
            lambda a: mb.clamped_relu(x=a, alpha=c(0.25), beta=c(1)), lambda t: F.leaky_relu(t, 0.25).clamp(max=1),
        ),
        "thresholded_relu": (lambda a: mb.thresholded_relu(x=a, alpha=c(0.5)), lambda t: t * (t >= 0.5)),
        "gelu tanh": (lambda a: mb.gelu(x=a, mode="TANH_APPROXIMATION"), lambda t: F.gelu(t, approximate="tanh")),
        "gelu sigmoid": (
            lambda a: mb.gelu(x=a, mode="SIGMOID_APPROXIMATION"), lambda t: t * torch.sigmoid(1.702 * t),
        ),
        "softmax": (lambda a: mb.softmax(x=a, axis=1), lambda t: t.softmax(1)),
    }  # fmt: skip
    results = run(lambda a: tuple(make(a) for make, _ in cases.values()), [x], tmp_path)
    for (name, (_, twin)), result in zip(cases.items(), results, strict=True):
        expected = twin(torch.from_numpy(x).float()).numpy().astype(dtype)
        np.testing.assert_allclose(result, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], err_msg=name)
        assert result.dtype == dtype, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_casts_lose_the_fraction_toward_zero(dtype, tmp_path):
    x = np.array([-2.7, -0.5, 0.0, 0.5, 2.7, 1000.4], dtype=dtype)

    def body(a):
        whole = mb.cast(x=a, dtype="int32")
        return whole, mb.cast(x=whole, dtype="fp16"), mb.cast(x=mb.cast(x=a, dtype="bool"), dtype="int32")

    whole, half, flag = run(body, [x], tmp_path)
    np.testing.assert_array_equal(whole, np.trunc(x).astype(np.int32))
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, np.trunc(x).astype(np.float16))
    np.testing.assert_array_equal(flag, (x != 0).astype(np.int32))


@pytest.mark.parametrize("dtype", [*DTYPES, np.int32])
def test_moving_ops_whatever_is_moved(dtype, tmp_path):
    x = (rng().standard_normal((2, 3, 4, 6)) * 9).astype(dtype)
    t = torch.from_numpy(x)
    cases = {
        "reshape": (lambda a: mb.reshape(x=a, shape=[2, -1, 6]), t.reshape(2, 12, 6)),
        "transpose": (lambda a: mb.transpose(x=a, perm=[3, 0, 2, 1]), t.permute(3, 0, 2, 1)),
        "expand_dims": (lambda a: mb.expand_dims(x=a, axes=[2]), t[:, :, None]),
        "squeeze": (lambda a: mb.squeeze(x=mb.expand_dims(x=a, axes=[0])), t),
        "concat": (lambda a: mb.concat(values=[a, a, a], axis=-1), torch.cat([t, t, t], -1)),
        "stack": (lambda a: mb.stack(values=[a, a], axis=2), torch.stack([t, t], 2)),
        "split": (lambda a: mb.split(x=a, num_splits=2, axis=-1)[0], t[..., :3]),
        "tile": (lambda a: mb.tile(x=a, reps=[2, 1, 2, 1]), t.repeat(2, 1, 2, 1)),
        "slice": (lambda a: mb.slice_by_index(x=a, begin=[0, 1, 0, 0], end=[2, 3, 4, 6], stride=[1, 1, 2, 3]),
                  t[:, 1:, ::2, ::3]),
        "slice_by_size": (lambda a: mb.slice_by_size(x=a, begin=[1, 0, 1, 0], size=[1, 3, 2, 6]), t[1:, :, 1:3]),
        "gather": (lambda a: mb.gather(x=a, indices=np.int32([3, 0]), axis=2), t[:, :, [3, 0]]),
        "identity": (lambda a: mb.identity(x=a), t),
    }  # fmt: skip
    results = run(lambda a: tuple(make(a) for make, _ in cases.values()), [x], tmp_path)
    for (name, (_, expected)), result in zip(cases.items(), results, strict=True):
        assert result.dtype == dtype, name
        np.testing.assert_array_equal(result, expected.numpy(), err_msg=name)


def test_moving_ops_in_all_their_forms(tmp_path):
    x = rng().standard_normal((2, 3, 4, 6)).astype(np.float32)
    t = torch.from_numpy(x)
    cases = {
        "reshape": (lambda a: mb.reshape(x=a, shape=[0, -1, 2, 3]), t.reshape(2, 12, 2, 3)),
        "transpose": (lambda a: mb.transpose(x=a, perm=[0, 2, 3, 1]), t.permute(0, 2, 3, 1)),
        "expand_dims": (lambda a: mb.expand_dims(x=a, axes=[-1]), t[..., None]),
        "squeeze": (lambda a: mb.squeeze(x=mb.expand_dims(x=a, axes=[2]), axes=[2]), t),
        "concat": (lambda a: mb.concat(values=[a, a], axis=1), torch.cat([t, t], 1)),
        "interleave": (
            lambda a: mb.concat(values=[a, mb.mul(x=a, y=2.0)], axis=1, interleave=True),
            torch.stack([t, 2 * t], 2).reshape(2, 6, 4, 6),
        ),
        "stack": (lambda a: mb.stack(values=[a, a], axis=-1), torch.stack([t, t], -1)),
        "split": (lambda a: mb.split(x=a, num_splits=3, axis=1)[1], t[:, 1:2]),
        "split sizes": (lambda a: mb.split(x=a, split_sizes=[1, 5], axis=3)[1], t[..., 1:]),
        "tile": (lambda a: mb.tile(x=a, reps=[1, 2, 1, 3]), t.repeat(1, 2, 1, 3)),
        "slice": (
            lambda a: mb.slice_by_index(x=a, begin=[0, 0, 1, 5], end=[2, 1, -1, 0], stride=[1, 1, 1, -2],
                                        begin_mask=[True, False, False, False], end_mask=[True, False, False, False],
                                        squeeze_mask=[False, True, False, False]),
            torch.from_numpy(x[:, 0, 1:-1, 5:0:-2].copy()),
        ),
        "slice_by_size": (
            lambda a: mb.slice_by_size(x=a, begin=[0, 1, 0, 2], size=[-1, 2, 3, -1]), t[:, 1:3, :3, 2:],
        ),
        "pad": (
            lambda a: mb.pad(x=a, pad=[1, 0, 2, 3], mode="constant", constant_val=0.5),
            F.pad(t, (2, 3, 1, 0), value=0.5),
        ),
        "reflect": (lambda a: mb.pad(x=a, pad=[1, 2, 2, 1], mode="reflect"), F.pad(t, (2, 1, 1, 2), mode="reflect")),
        "replicate": (
            lambda a: mb.pad(x=a, pad=[1, 2, 2, 1], mode="replicate"), F.pad(t, (2, 1, 1, 2), mode="replicate"),
        ),
        "pixel_shuffle": (
            lambda a: mb.pixel_shuffle(x=mb.concat(values=[a, a, a, a], axis=1), upscale_factor=2),
            F.pixel_shuffle(torch.cat([t] * 4, 1), 2),
        ),
        "pixel_unshuffle": (
            lambda a: mb.pixel_unshuffle(x=a, downscale_factor=np.uint32(2)), F.pixel_unshuffle(t, 2),
        ),
        "identity": (lambda a: mb.identity(x=a), t),
        "fill": (lambda a: mb.add(x=a, y=mb.fill(shape=[4, 1], value=0.5)), t + 0.5),
        "fill_like": (lambda a: mb.add(x=a, y=mb.fill_like(ref_tensor=a, value=2.0)), t + 2),
        "cumsum": (lambda a: mb.cumsum(x=a, axis=2), t.cumsum(2)),
        "cumsum reversed": (
            lambda a: mb.cumsum(x=a, axis=3, reverse=True, exclusive=True), t.flip(3).cumsum(3).flip(3) - t,
        ),
        "band_part": (lambda a: mb.band_part(x=a, lower=1, upper=2), torch.tril(torch.triu(t, -1), 2)),
        "shape": (lambda a: mb.shape(x=a), torch.tensor(t.shape, dtype=torch.int32)),
        "range_1d": (lambda a: mb.range_1d(start=3, end=9, step=2), torch.arange(3, 9, 2, dtype=torch.int32)),
    }  # fmt: skip
    results = run(lambda a: tuple(make(a) for make, _ in cases.values()), [x], tmp_path)
    for (name, (_, expected)), result in zip(cases.items(), results, strict=True):
        np.testing.assert_allclose(result, expected.numpy(), rtol=1e-6, atol=1e-6, err_msg=name)


def test_gathers_sorts_and_reductions(tmp_path):
    x = rng().standard_normal((3, 4, 5)).astype(np.float32)
    t = torch.from_numpy(x)
    pick = np.array([[2, 0], [-1, 1]], dtype=np.int32)
    rows = rng(1).integers(0, 4, (3, 2, 5)).astype(np.int32)
    points = np.array([[0, 1], [2, 3]], dtype=np.int32)
    batched = np.array([[0, 3], [1, 1], [2, 0]], dtype=np.int32)
    cases = {
        "gather": (lambda a: mb.gather(x=a, indices=pick, axis=1), x[:, pick]),
        "gather batch": (
            lambda a: mb.gather(x=a, indices=batched, axis=1, batch_dims=1), x[np.arange(3)[:, None], batched],
        ),
        "along": (lambda a: mb.gather_along_axis(x=a, indices=rows, axis=1), np.take_along_axis(x, rows, 1)),
        "nd": (lambda a: mb.gather_nd(x=a, indices=points), x[points[:, 0], points[:, 1]]),
        "nd batch": (
            lambda a: mb.gather_nd(x=a, indices=batched[:, None, :], batch_dims=1),
            x[np.arange(3), batched[:, 0], batched[:, 1]][:, None],
        ),
        "one_hot": (
            lambda a: mb.one_hot(indices=np.array([0, 2], dtype=np.int32), one_hot_vector_size=3, axis=-1,
                                 on_value=2.0, off_value=-1.0),
            np.array([[2, -1, -1], [-1, -1, 2]], dtype=np.float32),
        ),
        "argsort": (lambda a: mb.argsort(x=a, axis=1, ascending=False), np.argsort(-x, 1)),
        "topk values": (lambda a: mb.topk(x=a, k=2, axis=1, return_indices=False), -np.sort(-x, 1)[:, :2]),
        "topk": (lambda a: mb.topk(x=a, k=2, axis=-1)[1], np.argsort(-x, -1)[..., :2]),
        "mean": (lambda a: mb.reduce_mean(x=a, axes=[0, 2]), x.mean((0, 2))),
        "sum": (lambda a: mb.reduce_sum(x=a, axes=[1], keep_dims=True), x.sum(1, keepdims=True)),
        "max": (lambda a: mb.reduce_max(x=a, axes=[-1]), x.max(-1)),
        "min": (lambda a: mb.reduce_min(x=a, axes=[0, 1]), x.min((0, 1))),
        "prod": (lambda a: mb.reduce_prod(x=a, axes=[1, 2]), x.prod((1, 2))),
        "l1": (lambda a: mb.reduce_l1_norm(x=a, axes=[1]), np.abs(x).sum(1)),
        "l2": (lambda a: mb.reduce_l2_norm(x=a, axes=[1]), np.sqrt((x * x).sum(1))),
        "sum_square": (lambda a: mb.reduce_sum_square(x=a, axes=[2]), (x * x).sum(2)),
        "log_sum": (lambda a: mb.reduce_log_sum(x=mb.square(x=a), axes=[2]), np.log((x * x).sum(2))),
        "log_sum_exp": (lambda a: mb.reduce_log_sum_exp(x=a, axes=[2]), np.log(np.exp(x).sum(2))),
        "argmax": (lambda a: mb.reduce_argmax(x=a, axis=1, keep_dims=True), x.argmax(1)[:, None]),
        "argmin": (lambda a: mb.reduce_argmin(x=a, axis=-1), x.argmin(-1)),
    }  # fmt: skip
    results = run(lambda a: tuple(make(a) for make, _ in cases.values()), [x], tmp_path)
    for (name, (_, expected)), result in zip(cases.items(), results, strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert t.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "stride", "dilation"), [(1, 1, 1), (2, 2, 1), (1, 1, 2)])
def test_convolutions(groups, stride, dilation, dtype, tmp_path):
    x = rng().standard_normal((2, 4, 9, 8)).astype(dtype)
    w = rng(1).standard_normal((6, 4 // groups, 3, 2)).astype(dtype)
    b = rng(2).standard_normal(6).astype(dtype)
    up = rng(3).standard_normal((4, 3, 3, 3)).astype(dtype)
    common = {"weight": w, "bias": b, "strides": [stride] * 2, "dilations": [dilation] * 2, "groups": groups}

    def body(a):
        return (
            mb.conv(x=a, pad_type="custom", pad=[1, 2, 0, 1], **common),
            mb.conv(x=a, pad_type="valid", **common),
            mb.conv_transpose(x=a, weight=up, pad_type="custom", pad=[1, 1, 1, 1], strides=[2, 2]),
            mb.conv_transpose(
                x=a, weight=up, pad_type="custom", pad=[1, 1, 1, 1], strides=[2, 2], output_shape=[2, 3, 18, 16]
            ),
            mb.conv_transpose(x=a, weight=up, bias=b[:3], dilations=[2, 1]),
            mb.conv_transpose(
                x=a, weight=up, bias=b[:3], pad_type="custom", pad=[0] * 4, strides=[2, 2], output_shape=[2, 3, 20, 18]
            ),
            mb.conv(x=mb.reshape(x=a, shape=[2, 4, 72]), weight=w[:, :, 0], groups=groups),
        )

    results = run(body, [x], tmp_path)
    t, weight, bias = (torch.from_numpy(v).float() for v in (x, w, b))
    arguments = {"stride": stride, "dilation": dilation, "groups": groups}
    expected = [
        F.conv2d(F.pad(t, (0, 1, 1, 2)), weight, bias, **arguments),
        F.conv2d(t, weight, bias, **arguments),
        F.conv_transpose2d(t, torch.from_numpy(up).float(), stride=2, padding=1),
        F.conv_transpose2d(t, torch.from_numpy(up).float(), stride=2, padding=1, output_padding=1),
        F.conv_transpose2d(t, torch.from_numpy(up).float(), bias[:3], dilation=(2, 1)),
        F.conv_transpose2d(t, torch.from_numpy(up).float(), bias[:3], stride=2, output_padding=1),
        F.conv1d(t.reshape(2, 4, 72), weight[:, :, 0], groups=groups),
    ]
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == dtype
        np.testing.assert_allclose(result, wanted.numpy().astype(dtype), rtol=TOLERANCE[dtype], atol=1e-5)


@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 2), (9, 3, 2), (7, 2, 1), (5, 4, 3)])
def test_same_padding_puts_the_odd_element_last_and_same_lower_first(size, kernel, stride, tmp_path):
    x = rng().standard_normal((1, 1, size)).astype(np.float32)
    w = np.ones((1, 1, kernel), dtype=np.float32)
    outs = run(
        lambda a: tuple(mb.conv(x=a, weight=w, pad_type=kind, strides=[stride]) for kind in ("same", "same_lower")),
        [x], tmp_path,
    )  # fmt: skip
    total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
    for out, first in zip(outs, (total // 2, total - total // 2), strict=True):
        padded = F.pad(torch.from_numpy(x), (first, total - first))
        np.testing.assert_allclose(out, F.conv1d(padded, torch.from_numpy(w), stride=stride).numpy(), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_norms_and_attention(dtype, tmp_path):
    x = rng().standard_normal((2, 3, 4, 8)).astype(dtype)
    w, b = rng(1).standard_normal((5, 8)).astype(dtype), rng(2).standard_normal(5).astype(dtype)
    g, s = (rng(seed).uniform(0.5, 1.5, 8).astype(dtype) for seed in (3, 4))
    three = [rng(seed).uniform(0.5, 1.5, 3).astype(dtype) for seed in (5, 6, 7, 8)]
    t, weight, bias, gamma, shift = (torch.from_numpy(v).float() for v in (x, w, b, g, s))
    mean, var, scale, beta = (torch.from_numpy(v).float() for v in three)
    eps = dtype(1e-3)

    def body(a):
        return (
            mb.linear(x=mb.reshape(x=a, shape=[24, 8]), weight=w, bias=b),
            mb.matmul(x=a, y=a, transpose_y=True),
            mb.matmul(x=a, y=a, transpose_x=True),
            mb.layer_norm(x=a, axes=[-1], gamma=g, beta=s, epsilon=eps),
            mb.layer_norm(x=a, axes=[2, 3], epsilon=eps),
            mb.batch_norm(x=a, mean=three[0], variance=three[1], gamma=three[2], beta=three[3], epsilon=eps),
            mb.instance_norm(x=a, gamma=three[2], beta=three[3], epsilon=eps),
            mb.l2_norm(x=a, epsilon=eps),
            mb.einsum(values=(a, mb.transpose(x=a, perm=[0, 3, 2, 1])), equation="bnhw,bwhu->bnhu"),
        )

    expected = [
        F.linear(t.reshape(24, 8), weight, bias),
        t @ t.transpose(-1, -2),
        t.transpose(-1, -2) @ t,
        F.layer_norm(t, (8,), gamma, shift, float(eps)),
        F.layer_norm(t, (4, 8), eps=float(eps)),
        F.batch_norm(t, mean, var, scale, beta, eps=float(eps)),
        F.instance_norm(t, weight=scale, bias=beta, eps=float(eps)),
        t / torch.sqrt((t * t).sum((1, 2, 3), keepdim=True) + float(eps)),
        torch.einsum("bnhw,bwhu->bnhu", t, t.permute(0, 3, 2, 1)),
    ]
    results = run(body, [x], tmp_path)
    for number, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        assert result.dtype == dtype
        tolerance = {"rtol": TOLERANCE[dtype], "atol": 1e-3 if dtype == np.float16 else 1e-5}
        np.testing.assert_allclose(result, wanted.numpy(), **tolerance, err_msg=str(number))


@pytest.mark.parametrize("masked", ["none", "float", "bool"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_ios18(dtype, masked, tmp_path):
    q, k, v = (rng(seed).standard_normal((2, 3, 5, 8)).astype(dtype) for seed in range(3))
    mask = rng(4).standard_normal((5, 5)).astype(dtype)
    if masked == "bool":
        mask = (mask > 0) | np.eye(5, dtype=bool)
    extra = {} if masked == "none" else {"attn_mask": mask}
    out = run(
        lambda a, b, c: mb.scaled_dot_product_attention(query=a, key=b, value=c, **extra), [q, k, v], tmp_path, "iOS18"
    )[0]
    tensors = [torch.from_numpy(x).float() for x in (q, k, v)]
    twin = None if masked == "none" else torch.from_numpy(mask) if masked == "bool" else torch.from_numpy(mask).float()
    wanted = F.scaled_dot_product_attention(*tensors, attn_mask=twin)
    np.testing.assert_allclose(out, wanted.numpy(), rtol=TOLERANCE[dtype], atol=1e-3 if dtype == np.float16 else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (1, 1, 8, 8)])
def test_pools_and_resizes(shape, dtype, tmp_path):
    x = rng().standard_normal(shape).astype(dtype)
    t = torch.from_numpy(x).float()
    common = {"kernel_sizes": [3, 2], "strides": [2, 2]}
    pads = {"pad_type": "custom", "pad": [1, 1, 1, 1]}
    cases = {
        "max": (lambda a: mb.max_pool(x=a, **common, **pads), F.max_pool2d(t, (3, 2), 2, (1, 1))),
        "avg": (lambda a: mb.avg_pool(x=a, **common, **pads), F.avg_pool2d(t, (3, 2), 2, (1, 1))),
        "avg inside": (
            lambda a: mb.avg_pool(x=a, exclude_padding_from_average=True, **common, **pads),
            F.avg_pool2d(t, (3, 2), 2, (1, 1), count_include_pad=False),
        ),
        "avg valid": (lambda a: mb.avg_pool(x=a, pad_type="valid", **common), F.avg_pool2d(t, (3, 2), 2)),
        "nearest": (
            lambda a: mb.upsample_nearest_neighbor(x=a, scale_factor_height=2, scale_factor_width=3),
            F.interpolate(t, scale_factor=(2, 3), mode="nearest"),
        ),
        "resize nearest": (
            lambda a: mb.resize_nearest_neighbor(x=a, target_size_height=14, target_size_width=24),
            F.interpolate(t, size=(14, 24), mode="nearest"),
        ),
        "bilinear": (
            lambda a: mb.upsample_bilinear(x=a, scale_factor_height=2, scale_factor_width=2, align_corners=True),
            F.interpolate(t, scale_factor=2, mode="bilinear", align_corners=True),
        ),
        "bilinear halves": (
            lambda a: mb.upsample_bilinear(x=a, scale_factor_height=2, scale_factor_width=2, align_corners=False),
            F.interpolate(t, scale_factor=2, mode="bilinear", align_corners=False),
        ),
        "resize bilinear": (
            lambda a: mb.resize_bilinear(
                x=a, target_size_height=5, target_size_width=11, sampling_mode="STRICT_ALIGN_CORNERS"),
            F.interpolate(t, size=(5, 11), mode="bilinear", align_corners=True),
        ),
        "resize aligned": (
            lambda a: mb.resize_bilinear(
                x=a, target_size_height=9, target_size_width=4, sampling_mode="ALIGN_CORNERS"),
            F.interpolate(t, size=(9, 4), mode="bilinear", align_corners=True),
        ),
        "resize halves": (
            lambda a: mb.resize_bilinear(
                x=a, target_size_height=9, target_size_width=4, sampling_mode="UNALIGN_CORNERS"),
            F.interpolate(t, size=(9, 4), mode="bilinear", align_corners=False),
        ),
    }  # fmt: skip
    results = run(lambda a: tuple(make(a) for make, _ in cases.values()), [x], tmp_path)
    for (name, (_, expected)), result in zip(cases.items(), results, strict=True):
        tolerance = TOLERANCE[dtype]
        np.testing.assert_allclose(result, expected.numpy().astype(dtype), tolerance, tolerance, err_msg=name)


def test_activations_quantised_to_a_byte_and_back(tmp_path):
    x = (rng().standard_normal((3, 4)) * 4).astype(np.float32)
    scale, zero = np.array([0.1, 0.05, 0.02], dtype=np.float32), np.array([3, 0, -5], dtype=np.int8)

    def body(a):
        byte = mb.quantize(input=a, scale=scale, zero_point=zero, axis=0, output_dtype="int8")
        return mb.dequantize(input=byte, scale=scale, zero_point=zero, axis=0)

    levels = np.clip(np.round(x / scale[:, None]) + zero[:, None], -128, 127)
    wanted = (levels - zero[:, None]) * scale[:, None]
    np.testing.assert_allclose(run(body, [x], tmp_path, "iOS17")[0], wanted, rtol=1e-5, atol=1e-6)


def test_a_branch_and_a_loop(tmp_path):
    x = np.array([1.0, 2.0], dtype=np.float32)

    def body(a):
        doubled = mb.while_loop(
            _cond=lambda n, v: mb.less(x=n, y=3), _body=lambda n, v: (mb.add(x=n, y=1), mb.mul(x=v, y=a)),
            loop_vars=(mb.reduce_argmin(x=a, axis=0), mb.identity(x=a)),
        )[1]  # fmt: skip
        small = mb.less(x=mb.reduce_sum(x=doubled, axes=[0]), y=5.0)
        return mb.cond(
            pred=small, _true_fn=lambda: mb.sub(x=doubled, y=1.0), _false_fn=lambda: mb.add(x=doubled, y=1.0)
        )

    np.testing.assert_allclose(run(body, [x], tmp_path)[0], x**4 + 1)


def test_every_kernel_has_a_test():
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_mil_*.py"))
    tested = set(re.findall(r"mb\.(\w+)\(", sources)) | {*UNARY, *BINARY, *COMPARE, *LOGICAL}
    assert set(KERNELS) - tested == set()
    assert len(KERNELS) >= 120
