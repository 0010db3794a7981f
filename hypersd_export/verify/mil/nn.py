"""MIL kernels of layers: products, convolutions, normalisations, pooling, resizing and attention."""

import math

import torch
from torch.nn import functional as F

from hypersd_export.verify.mil.ops import Args, kernel, pairwise_pads

Tensor = torch.Tensor


@kernel("linear")
def _linear(args: Args) -> Tensor:
    return F.linear(args("x"), args("weight"), args.maybe("bias"))


@kernel("matmul")
def _matmul(args: Args) -> Tensor:
    x, y = args("x"), args("y")
    return torch.matmul(
        x.transpose(-1, -2) if args.flag("transpose_x") else x, y.transpose(-1, -2) if args.flag("transpose_y") else y
    )


@kernel("einsum")
def _einsum(args: Args) -> Tensor:
    return torch.einsum(args.text("equation"), *args.many("values"))


def spatial_pads(
    args: Args, sizes: list[int], kernels: list[int], strides: list[int], dilations: list[int]
) -> list[int]:
    """[begin, end, …] of the spatial axes: what `pad_type` says (valid, same, same_lower or custom)."""
    kind = args.text("pad_type", "valid")
    if kind == "valid":
        return [0] * (2 * len(sizes))
    if kind == "custom":
        return args.integers("pad")
    if kind not in ("same", "same_lower"):
        raise ValueError(f"there is no pad_type {kind}")
    pads = []
    for size, width, stride, dilation in zip(sizes, kernels, strides, dilations, strict=True):
        reach = dilation * (width - 1) + 1
        total = max(0, (math.ceil(size / stride) - 1) * stride + reach - size)
        less, more = total // 2, total - total // 2
        pads += [less, more] if kind == "same" else [more, less]
    return pads


@kernel("conv")
def _conv(args: Args) -> Tensor:
    """x [B, C, spatial…], weight [out, C / groups, kernel…]."""
    x, weight = args("x"), args("weight")
    axes = x.ndim - 2
    strides, dilations = args.integers("strides", [1] * axes), args.integers("dilations", [1] * axes)
    pads = spatial_pads(args, list(x.shape[2:]), list(weight.shape[2:]), strides, dilations)
    if any(pads):
        x = F.pad(x, list(pairwise_pads(pads)))
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    return convolve(x, weight, args.maybe("bias"), strides, 0, dilations, args.integer("groups", 1))


@kernel("conv_transpose")
def _conv_transpose(args: Args) -> Tensor:
    """weight [C, out / groups, kernel…]; the pads are cropped off, or what lies beyond them and `output_shape`."""
    x, weight = args("x"), args("weight")
    axes, kind = x.ndim - 2, args.text("pad_type", "valid")
    strides, dilations = args.integers("strides", [1] * axes), args.integers("dilations", [1] * axes)
    if kind not in ("valid", "custom"):
        raise ValueError(f"conv_transpose with pad_type {kind} is not understood")
    convolve = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[axes]
    full = convolve(x, weight, None, strides, 0, 0, args.integer("groups", 1), dilations)
    pads = args.integers("pad") if kind == "custom" else [0] * (2 * axes)
    crops = [-crop for crop in pads]
    if "output_shape" in args:
        sides = zip(args.integers("output_shape")[-axes:], full.shape[2:], pads[::2], strict=True)
        crops[1::2] = [size - (have - begin) for size, have, begin in sides]
    out, bias = F.pad(full, list(pairwise_pads(crops))), args.maybe("bias")
    return out if bias is None else out + bias.reshape(-1, *[1] * axes)


@kernel("layer_norm")
def _layer_norm(args: Args) -> Tensor:
    """Over `axes` (all by default), which need not be the last; gamma and beta have the shape of those axes."""
    x = args("x")
    axes = sorted(axis % x.ndim for axis in args.integers("axes", list(range(x.ndim))))
    centred = x - x.mean(axes, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + args.real("epsilon", 1e-5))
    shape = [x.shape[axis] if axis in axes else 1 for axis in range(x.ndim)]
    gamma, beta = args.maybe("gamma"), args.maybe("beta")
    out = out if gamma is None else out * gamma.reshape(shape)
    return out if beta is None else out + beta.reshape(shape)


@kernel("batch_norm")
def _batch_norm(args: Args) -> Tensor:
    return F.batch_norm(
        args("x"),
        args("mean"),
        args("variance"),
        args.maybe("gamma"),
        args.maybe("beta"),
        eps=args.real("epsilon", 1e-5),
    )


@kernel("instance_norm")
def _instance_norm(args: Args) -> Tensor:
    return F.instance_norm(
        args("x"), weight=args.maybe("gamma"), bias=args.maybe("beta"), eps=args.real("epsilon", 1e-5)
    )


@kernel("l2_norm")
def _l2_norm(args: Args) -> Tensor:
    """Over the last three axes: x / sqrt(sum x² + epsilon)."""
    x = args("x")
    return x * torch.rsqrt(x.square().sum((-3, -2, -1), keepdim=True) + args.real("epsilon", 1e-6))


@kernel("scaled_dot_product_attention")
def _attention(args: Args) -> Tensor:
    """softmax(q kᵀ / sqrt(E) + mask) v; a boolean mask keeps where it is true."""
    query, key, value, mask = args("query"), args("key"), args("value"), args.maybe("attn_mask")
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1) @ value


@kernel("max_pool")
def _max_pool(args: Args) -> Tensor:
    x, pads, kernels, strides, ceil = _pooling(args)
    padded = F.pad(x, list(pairwise_pads(pads)), value=float("-inf"))
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(kernels)]
    return pool(padded, kernels, strides, ceil_mode=ceil)


@kernel("avg_pool")
def _avg_pool(args: Args) -> Tensor:
    """Sums over the window divided by its size, or by its elements inside x."""
    x, pads, kernels, strides, ceil = _pooling(args)
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(kernels)]
    torch_pads = list(pairwise_pads(pads))
    mean = pool(F.pad(x, torch_pads), kernels, strides, ceil_mode=ceil)
    if not args.flag("exclude_padding_from_average"):
        return mean
    return mean / pool(F.pad(torch.ones_like(x), torch_pads), kernels, strides, ceil_mode=ceil)


def _pooling(args: Args) -> tuple[Tensor, list[int], list[int], list[int], bool]:
    x, kernels = args("x"), args.integers("kernel_sizes")
    strides = args.integers("strides", [1] * len(kernels))
    pads = spatial_pads(args, list(x.shape[2:]), kernels, strides, [1] * len(kernels))
    return x, pads, kernels, strides, args.flag("ceil_mode")


@kernel("upsample_nearest_neighbor")
def _upsample_nearest(args: Args) -> Tensor:
    return _nearest(args("x"), _scaled(args))


@kernel("resize_nearest_neighbor")
def _resize_nearest(args: Args) -> Tensor:
    return _nearest(args("x"), _target(args))


def _nearest(x: Tensor, size: list[int]) -> Tensor:
    """[…, H, W] at another size, element i from floor(i * old / new)."""
    for axis, wanted in zip((-2, -1), size, strict=True):
        x = x.index_select(axis, torch.arange(wanted) * x.shape[axis] // wanted)
    return x


@kernel("upsample_bilinear")
def _upsample_bilinear(args: Args) -> Tensor:
    aligned = args.flag("align_corners", True)
    if args.flag("half_pixel_centers", not aligned) == aligned:
        raise ValueError("align_corners and half_pixel_centers must differ")
    return F.interpolate(args("x"), size=_scaled(args), mode="bilinear", align_corners=aligned)


@kernel("resize_bilinear")
def _resize_bilinear(args: Args) -> Tensor:
    """STRICT_ALIGN_CORNERS and UNALIGN_CORNERS are torch's two; ALIGN_CORNERS differs from the first at size 1 only."""
    size, mode = _target(args), args.text("sampling_mode", "DEFAULT")
    aligned = {"STRICT_ALIGN_CORNERS": True, "UNALIGN_CORNERS": False}.get(mode)
    if mode == "ALIGN_CORNERS" and min(size) > 1:
        aligned = True
    if aligned is None:
        raise ValueError(f"resize_bilinear in the mode {mode} is not understood")
    return F.interpolate(args("x"), size=size, mode="bilinear", align_corners=aligned)


def _scaled(args: Args) -> list[int]:
    """[H, W] times the scale factors, which may be fractions."""
    names = ("scale_factor_height", "scale_factor_width")
    return [math.floor(side * args.real(name, 1.0)) for side, name in zip(args("x").shape[-2:], names, strict=True)]


def _target(args: Args) -> list[int]:
    return [args.integer("target_size_height", 1), args.integer("target_size_width", 1)]
