"""MIL kernels that act on elements: arithmetic, comparisons, activations and casts."""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from hypersd_export.verify.mil.ops import Args, along, dequantized, kernel

Tensor = torch.Tensor

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "identity": torch.clone,
    "logical_not": torch.logical_not,
    "round": torch.round,
    "sign": torch.sign,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "softsign": F.softsign,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "real_div": torch.true_divide,
    "floor_div": torch.floor_divide,
    "mod": torch.remainder,
    "pow": torch.pow,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
}


def _unary(function: Callable[[Tensor], Tensor], args: Args) -> Tensor:
    return function(args("x"))


def _binary(function: Callable[[Tensor, Tensor], Tensor], args: Args) -> Tensor:
    return function(args("x"), args("y"))


for _name, _one in UNARY.items():
    kernel(_name)(partial(_unary, _one))
for _name, _two in BINARY.items():
    kernel(_name)(partial(_binary, _two))


@kernel("inverse")
def _inverse(args: Args) -> Tensor:
    return 1.0 / (args("x") + args.real("epsilon", 1e-4))


@kernel("log")
def _log(args: Args) -> Tensor:
    return torch.log(args("x") + args.real("epsilon", 1e-45))


@kernel("rsqrt")
def _rsqrt(args: Args) -> Tensor:
    return torch.rsqrt(args("x") + args.real("epsilon", 1e-12))


@kernel("clip")
def _clip(args: Args) -> Tensor:
    return torch.clamp(args("x"), args.real("alpha"), args.real("beta"))


@kernel("threshold")
def _threshold(args: Args) -> Tensor:
    return torch.clamp(args("x"), min=args.real("alpha"))


@kernel("gelu")
def _gelu(args: Args) -> Tensor:
    """EXACT by the error function, TANH_APPROXIMATION, or x * sigmoid(1.702 x)."""
    x, mode = args("x"), args.text("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    if mode not in ("EXACT", "TANH_APPROXIMATION"):
        raise ValueError(f"gelu has no mode {mode}")
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


@kernel("leaky_relu")
def _leaky_relu(args: Args) -> Tensor:
    return F.leaky_relu(args("x"), args.real("alpha", 0.01))


@kernel("elu")
def _elu(args: Args) -> Tensor:
    return F.elu(args("x"), args.real("alpha", 1.0))


@kernel("prelu")
def _prelu(args: Args) -> Tensor:
    return F.prelu(args("x"), args("alpha"))


@kernel("sigmoid_hard")
def _sigmoid_hard(args: Args) -> Tensor:
    return torch.clamp(args.real("alpha", 0.2) * args("x") + args.real("beta", 0.5), 0.0, 1.0)


@kernel("scaled_tanh")
def _scaled_tanh(args: Args) -> Tensor:
    return args.real("alpha", 1.0) * torch.tanh(args.real("beta", 1.0) * args("x"))


@kernel("linear_activation")
def _linear_activation(args: Args) -> Tensor:
    return args.real("alpha") * args("x") + args.real("beta", 0.0)


@kernel("clamped_relu")
def _clamped_relu(args: Args) -> Tensor:
    x = args("x")
    return torch.clamp(torch.where(x >= 0, x, args.real("alpha") * x), max=args.real("beta"))


@kernel("thresholded_relu")
def _thresholded_relu(args: Args) -> Tensor:
    x = args("x")
    return torch.where(x >= args.real("alpha", 1.0), x, torch.zeros_like(x))


@kernel("softmax")
def _softmax(args: Args) -> Tensor:
    return torch.softmax(args("x"), args.integer("axis", -1))


@kernel("select")
def _select(args: Args) -> Tensor:
    return torch.where(args("cond").bool(), args("a"), args("b"))


@kernel("cast")
def _cast(args: Args) -> Tensor:
    """To the declared type of the result, which the interpreter applies; floats lose their fraction toward zero."""
    x, to = args("x"), args.text("dtype")
    if args.outputs and args.outputs[0] != to:
        raise ValueError(f"it casts to {to}, but its result is declared as {args.outputs[0]}")
    return x.bool() if to == "bool" else x.trunc() if "int" in to and x.is_floating_point() else x


@kernel("quantize")
def _quantize(args: Args) -> Tensor:
    x, (low, high) = args("input"), {"int8": (-128, 127), "uint8": (0, 255)}[args.text("output_dtype")]
    return torch.clamp(torch.round(x / along(args, "scale", x)) + along(args, "zero_point", x), low, high)


@kernel("dequantize")
def _dequantize(args: Args) -> Tensor:
    return dequantized(args, args("input"))
