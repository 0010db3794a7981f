"""MIL kernels that move and reduce: shapes, slices, joins, gathers, reductions and constants."""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from hypersd_export.verify.mil.ops import Args, kernel, pairwise_pads

Tensor = torch.Tensor


@kernel("reshape")
def _reshape(args: Args) -> Tensor:
    """A 0 in the new shape keeps the axis, a -1 takes what is left."""
    x, wanted = args("x"), args.integers("shape")
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)])


@kernel("transpose")
def _transpose(args: Args) -> Tensor:
    return args("x").permute(args.integers("perm"))


@kernel("expand_dims")
def _expand_dims(args: Args) -> Tensor:
    x, axes = args("x"), args.integers("axes")
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@kernel("squeeze")
def _squeeze(args: Args) -> Tensor:
    x = args("x")
    if "axes" not in args:
        return x.squeeze()
    axes = [axis % x.ndim for axis in args.integers("axes")]
    if any(x.shape[axis] != 1 for axis in axes):
        raise ValueError(f"axes {axes} of shape {list(x.shape)} are not all 1")
    return x.squeeze(axes)


@kernel("concat")
def _concat(args: Args) -> Tensor:
    """Joined along `axis`; interleaved takes one slice of each in turn."""
    parts, axis = args.many("values"), args.integer("axis")
    if not args.flag("interleave"):
        return torch.cat(parts, axis)
    axis %= parts[0].ndim
    return torch.stack(parts, axis + 1).flatten(axis, axis + 1)


@kernel("stack")
def _stack(args: Args) -> Tensor:
    return torch.stack(args.many("values"), args.integer("axis"))


@kernel("split")
def _split(args: Args) -> tuple[Tensor, ...]:
    x, axis = args("x"), args.integer("axis")
    if "split_sizes" in args:
        return torch.split(x, args.integers("split_sizes"), axis)
    count = args.integer("num_splits")
    if x.shape[axis] % count:
        raise ValueError(f"{x.shape[axis]} elements in {count} equal parts")
    return torch.split(x, x.shape[axis] // count, axis)


@kernel("tile")
def _tile(args: Args) -> Tensor:
    return args("x").repeat(args.integers("reps"))


@kernel("slice_by_index")
def _slice_by_index(args: Args) -> Tensor:
    """NumPy's slicing, negative strides included, with masks that leave a bound open or take one index."""
    x = args("x")
    begin, end = args.integers("begin"), args.integers("end")
    stride = args.integers("stride", [1] * x.ndim)
    masks = [args.flags(name, x.ndim) for name in ("begin_mask", "end_mask", "squeeze_mask")]
    gone = []
    for axis in range(x.ndim):
        from_start, to_end, squeeze = (mask[axis] for mask in masks)
        if squeeze:
            gone.append(axis)
            x = x.narrow(axis, range(x.shape[axis])[begin[axis]], 1)
            continue
        indices = range(x.shape[axis])[
            slice(None if from_start else begin[axis], None if to_end else end[axis], stride[axis])
        ]
        x = x.index_select(axis, torch.tensor(list(indices), dtype=torch.int64))
    return x.squeeze(gone) if gone else x


@kernel("slice_by_size")
def _slice_by_size(args: Args) -> Tensor:
    """From `begin`, as many as `size`; -1 is up to the end."""
    x = args("x")
    for axis, (begin, size) in enumerate(zip(args.integers("begin"), args.integers("size"), strict=True)):
        first = begin % x.shape[axis] if begin < 0 else begin
        x = x.narrow(axis, first, x.shape[axis] - first if size == -1 else size)
    return x


@kernel("pad")
def _pad(args: Args) -> Tensor:
    """Pads count for the last axes; torch's reflection and replication want leading axes, which are added."""
    x, pads, mode = args("x"), list(pairwise_pads(args.integers("pad"))), args.text("mode", "constant")
    if mode == "constant":
        value = args.real("constant_val", 0.0)
        return F.pad(x, pads, value=value)
    if mode not in ("reflect", "replicate"):
        raise ValueError(f"pad has no mode {mode}")
    while len(pads) > 2 and pads[-2:] == [0, 0]:
        pads = pads[:-2]
    inner = len(pads) // 2
    flat = x.reshape(-1, 1, *x.shape[x.ndim - inner :])
    padded = F.pad(flat, pads, mode=mode)
    return padded.reshape(*x.shape[: x.ndim - inner], *padded.shape[2:])


@kernel("gather")
def _gather(args: Args) -> Tensor:
    """Slices of x at indices along `axis`; the first `batch_dims` axes of both go together."""
    x, indices, batch = args("x"), args("indices").long(), args.integer("batch_dims", 0)
    axis = args.integer("axis", 0) % x.ndim
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    if batch == 0:
        picked = x.index_select(axis, indices.reshape(-1))
        return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    lead = x.shape[:batch]
    rows, at = x.reshape(-1, *x.shape[batch:]), indices.reshape(-1, *indices.shape[batch:])
    parts = [row.index_select(axis - batch, i.reshape(-1)) for row, i in zip(rows, at, strict=True)]
    return torch.stack(parts).reshape(*lead, *x.shape[batch:axis], *indices.shape[batch:], *x.shape[axis + 1 :])


@kernel("gather_along_axis")
def _gather_along_axis(args: Args) -> Tensor:
    x, indices = args("x"), args("indices").long()
    axis = args.integer("axis", 0)
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices))


@kernel("gather_nd")
def _gather_nd(args: Args) -> Tensor:
    """The last axis of indices holds coordinates into x after its first `batch_dims` axes."""
    x, indices, batch = args("x"), args("indices").long(), args.integer("batch_dims", 0)
    if batch:
        lead = x.shape[:batch]
        rows, at = x.reshape(-1, *x.shape[batch:]), indices.reshape(-1, *indices.shape[batch:])
        parts = [row[tuple(i.unbind(-1))] for row, i in zip(rows, at, strict=True)]
        return torch.stack(parts).reshape(*lead, *parts[0].shape)
    return x[tuple(indices.unbind(-1))]


@kernel("one_hot")
def _one_hot(args: Args) -> Tensor:
    count, axis = args.integer("one_hot_vector_size"), args.integer("axis", -1)
    on, off = args.maybe("on_value"), args.maybe("off_value")
    hot = F.one_hot(args("indices").long(), count).bool().movedim(-1, axis)
    one, zero = torch.tensor(1) if on is None else on, torch.tensor(0) if off is None else off
    return torch.where(hot, one, zero)


@kernel("range_1d")
def _range_1d(args: Args) -> Tensor:
    return torch.arange(args("start").item(), args("end").item(), args("step").item())


@kernel("shape")
def _shape(args: Args) -> Tensor:
    return torch.tensor(args("x").shape, dtype=torch.int32)


@kernel("fill")
def _fill(args: Args) -> Tensor:
    value = args.maybe("value")
    return (torch.tensor(0.0) if value is None else value).expand(args.integers("shape"))


@kernel("fill_like")
def _fill_like(args: Args) -> Tensor:
    value = args.maybe("value")
    return (torch.tensor(0.0) if value is None else value).expand(args("ref_tensor").shape)


@kernel("cumsum")
def _cumsum(args: Args) -> Tensor:
    x, axis = args("x"), args.integer("axis", 0)
    turned = x.flip(axis) if args.flag("reverse") else x
    total = turned.cumsum(axis)
    if args.flag("exclusive"):
        total = total - turned
    return total.flip(axis) if args.flag("reverse") else total


@kernel("argsort")
def _argsort(args: Args) -> Tensor:
    return torch.argsort(args("x"), dim=args.integer("axis", -1), descending=not args.flag("ascending"), stable=True)


@kernel("topk")
def _topk(args: Args) -> tuple[Tensor, ...]:
    """Values and, unless it says otherwise, their indices; always sorted, which covers `sort` false."""
    values, indices = torch.topk(
        args("x"), args.integer("k", 1), dim=args.integer("axis", -1), largest=not args.flag("ascending")
    )
    return (values, indices) if args.flag("return_indices", True) else (values,)


@kernel("band_part")
def _band_part(args: Args) -> Tensor:
    """Zero all but `lower` diagonals below and `upper` above the main one; -1 keeps the whole triangle."""
    x, lower, upper = args("x"), args.integer("lower", -1), args.integer("upper", -1)
    kept = x if lower < 0 else torch.triu(x, -lower)
    return kept if upper < 0 else torch.tril(kept, upper)


@kernel("pixel_shuffle")
def _pixel_shuffle(args: Args) -> Tensor:
    return F.pixel_shuffle(args("x"), args.integer("upscale_factor"))


@kernel("pixel_unshuffle")
def _pixel_unshuffle(args: Args) -> Tensor:
    return F.pixel_unshuffle(args("x"), args.integer("downscale_factor"))


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


Reduction = Callable[[Tensor, list[int], bool], Tensor]
REDUCTIONS: dict[str, Reduction] = {
    "reduce_mean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "reduce_sum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "reduce_max": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "reduce_min": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "reduce_l1_norm": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "reduce_l2_norm": lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt(),
    "reduce_sum_square": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
    "reduce_log_sum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "reduce_log_sum_exp": lambda x, axes, keep: x.logsumexp(axes, keepdim=keep),
    "reduce_prod": _product,
}


def _reduce(function: Reduction, args: Args) -> Tensor:
    x = args("x")
    return function(x, args.integers("axes", list(range(x.ndim))), args.flag("keep_dims"))


for _name, _function in REDUCTIONS.items():
    kernel(_name)(partial(_reduce, _function))


@kernel("reduce_argmax")
def _argmax(args: Args) -> Tensor:
    return args("x").argmax(args.integer("axis", -1), keepdim=args.flag("keep_dims"))


@kernel("reduce_argmin")
def _argmin(args: Args) -> Tensor:
    return args("x").argmin(args.integer("axis", -1), keepdim=args.flag("keep_dims"))
