"""Why the interpreter can be believed: a network that coremltools converted by itself, and every way to spoil it.

The network shares nothing with this project: no exporter, no graph of ours; `torch.export` and `ct.convert` alone.
"""

import copy
import shutil
import struct

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hypersd_export.errors import BundleError
from hypersd_export.verify.metrics import psnr
from hypersd_export.verify.mil import open_package

ct = pytest.importorskip("coremltools")

LEAST_DB = 100.0
"""Of a float32 package against torch."""
PRECISION = {"fp32": ct.precision.FLOAT32, "fp16": ct.precision.FLOAT16}


class Toy(nn.Module):
    """Ids and a picture in, a picture out: embedding, convolutions, group norm, attention, a GELU, a skip."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.down = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.query, self.key, self.value = (nn.Linear(16, 16, bias=b) for b in (True, False, True))
        self.mix = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU())
        self.up = nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1)
        self.out = nn.Conv2d(11, 3, 3, padding=1)
        for parameter in (*self.norm.parameters(), *self.mix[0].parameters()):
            nn.init.uniform_(parameter, 0.5, 1.5)
        for layer in (self.mix[1], self.mix[3]):
            nn.init.normal_(layer.weight, std=0.5)  # so that GELUs take values where their kinds differ

    def forward(self, ids, picture):
        x = F.silu(self.norm(self.down(picture)))
        states, rows = self.words(ids), x.flatten(2).transpose(1, 2)
        heads = [part.unflatten(-1, (2, 8)).transpose(1, 2) for part in
                 (self.query(rows), self.key(states), self.value(states))]  # fmt: skip
        rows = rows + F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = (rows + self.mix(rows)).transpose(1, 2).reshape(x.shape)
        x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="nearest") + x
        return torch.tanh(self.out(torch.cat([self.up(x), picture], 1))) * torch.sin(picture.mean() + 1)


@pytest.fixture(scope="module")
def toy():
    """The network, its inputs and its output."""
    torch.manual_seed(0)
    net, ids, picture = Toy().eval(), torch.arange(20)[None], torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        return net, {"ids": ids.numpy(), "picture": picture.numpy()}, net(ids, picture).numpy()


@pytest.fixture(scope="module")
def packages(toy, tmp_path_factory):
    """The network as packages, by (precision, deployment target)."""
    net, inputs, _ = toy
    folder = tmp_path_factory.mktemp("toys")
    exported = torch.export.export(net, tuple(map(torch.from_numpy, inputs.values()))).run_decompositions({})
    found = {}
    for precision in PRECISION:
        for target in ("iOS16", "iOS18"):
            model = ct.convert(
                exported, minimum_deployment_target=getattr(ct.target, target), skip_model_load=True,
                compute_precision=PRECISION[precision],
            )  # fmt: skip
            found[precision, target] = folder / f"{precision}-{target}.mlpackage"
            model.save(str(found[precision, target]))
    return found


def decibels(path, toy):
    """How near a package comes to torch, in dB."""
    (out,) = open_package(path).evaluate(toy[1]).values()
    return psnr(out, toy[2])


@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_network_is_torchs_to_the_packages_precision(precision, target, packages, toy):
    low, high = {"fp32": (LEAST_DB, 150.0), "fp16": (65.0, 85.0)}[precision]  # 124 and 70 dB; half must be seen
    assert low < decibels(packages[precision, target], toy) < high
    assert len(open_package(packages[precision, target]).function().op_types()) > 20


def test_half_precision_comes_from_the_package_not_from_the_interpreter(packages, toy):
    """Unrounded, an fp16 package still has its rounded weights: better than rounded, worse than an fp32 package."""
    package = open_package(packages["fp16", "iOS16"])
    (out,) = package.evaluate(toy[1], rounding="fp32").values()
    assert decibels(packages["fp16", "iOS16"], toy) + 1 < psnr(out, toy[2]) < LEAST_DB


@pytest.fixture
def spoiled(packages, tmp_path):
    """A copy of the fp32 package for iOS 16: its folder, its program, and what writes the program back."""
    from coremltools.proto import Model_pb2

    path = shutil.copytree(packages["fp32", "iOS16"], tmp_path / "spoiled.mlpackage")
    file = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    model = Model_pb2.Model.FromString(file.read_bytes())
    function = model.mlProgram.functions["main"]
    return path, function.block_specializations[function.opset], lambda: file.write_bytes(model.SerializeToString())


def caught(path, toy):
    """Whether the package is refused, or its output misses the gate."""
    try:
        return not decibels(path, toy) >= LEAST_DB  # NaN is caught too
    except BundleError:
        return True


def test_every_weight_counts_down_to_one_flipped_sign(spoiled, toy):
    path, block, _ = spoiled
    file = path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    whole = file.read_bytes()
    offsets = {op.outputs[0].name: op.attributes["val"].blobFileValue.offset for op in block.operations
               if op.type == "const" and op.attributes["val"].WhichOneof("value") == "blobFileValue"}  # fmt: skip
    assert len(offsets) >= 16
    for name, offset in offsets.items():
        _, _, size, start = struct.unpack_from("<IIQQ", whole, offset)
        weight = np.frombuffer(whole, np.float32, size // 4, start).copy()
        if not weight.any():
            continue  # a mean or a bias that coremltools put there
        weight[np.abs(weight).argmax()] *= -1
        file.write_bytes(whole[:start] + weight.tobytes() + whole[start + size :])
        assert caught(path, toy), name
    file.write_bytes(whole)
    assert not caught(path, toy)


TWINS = {
    "sub": "add", "add": "mul", "mul": "real_div", "real_div": "mul", "square": "abs", "sqrt": "identity",
    "silu": "sigmoid", "tanh": "sigmoid", "sin": "cos", "gelu": "silu", "softmax": "sigmoid", "avg_pool": "max_pool",
    "reduce_mean": "reduce_max",
}  # fmt: skip
"""Ops and others that take and give the same shapes."""
OPERANDS = {
    "conv": ("pad", "strides"), "conv_transpose": ("pad", "strides"), "matmul": ("transpose_x", "transpose_y"),
    "gelu": ("mode",), "softmax": ("axis",), "layer_norm": ("axes", "epsilon"), "concat": ("axis",),
    "gather": ("axis",), "transpose": ("perm",), "reshape": ("shape",), "reduce_mean": ("axes",),
    "avg_pool": ("kernel_sizes", "strides"), "upsample_nearest_neighbor": ("scale_factor_height",),
}  # fmt: skip
"""Operands whose constants are changed."""


def test_every_op_counts(spoiled, toy):
    path, block, write = spoiled
    kinds = {op.type for op in block.operations} - {"const"}
    assert kinds <= {*TWINS, *OPERANDS, "linear", "batch_norm"}  # these two have nothing but weights
    for op in block.operations:
        if op.type in TWINS:
            kind, op.type = op.type, TWINS[op.type]
            write()
            assert caught(path, toy), op.outputs[0].name
            op.type = kind


def changed(values):
    """What a constant becomes: another mode, the other truth value, a permutation turned about, a larger number."""
    first, *rest = values
    if isinstance(first, str):
        return ["TANH_APPROXIMATION" if first == "EXACT" else "EXACT"]
    if isinstance(first, bool):
        return [not first]
    if sorted(values) == list(range(len(values))) and rest:
        return list(values)[::-1]
    return [first * 100 if isinstance(first, float) else first + 1, *rest]


def test_every_operand_counts(spoiled, toy):
    path, block, write = spoiled
    constants = {op.outputs[0].name: op.attributes["val"].immediateValue.tensor for op in block.operations
                 if op.type == "const"}  # fmt: skip
    names = {
        op.inputs[name].arguments[0].name: f"{op.outputs[0].name} {name}"
        for op in block.operations
        for name in OPERANDS.get(op.type, ())
        if name in op.inputs
    }
    assert len(names) > 30
    for constant, where in names.items():
        (held,) = (value.values for _, value in constants[constant].ListFields())
        before, held[:] = list(held), changed(held)
        write()
        assert caught(path, toy), where
        held[:] = before
    write()
    assert not caught(path, toy)


def test_every_declared_shape_counts(spoiled, toy):
    path, block, write = spoiled
    ops = [op for op in block.operations if op.type != "const" and op.outputs[0].type.tensorType.dimensions]
    assert len(ops) > 40
    for op in ops:
        axis = op.outputs[0].type.tensorType.dimensions[0].constant
        axis.size += 1
        write()
        name = op.outputs[0].name
        with pytest.raises(BundleError, match=rf"op {name} \({op.type}\) has the shape .*, the package declares"):
            open_package(path).evaluate(toy[1])
        axis.size -= 1


def test_torch_in_half_is_as_far_from_float32(packages, toy):
    """The error of an fp16 package is half precision's own, and not more than torch has."""
    net, inputs, reference = toy
    ids, picture = (torch.from_numpy(value) for value in inputs.values())
    with torch.no_grad():
        half = copy.deepcopy(net).half()(ids, picture.half()).float().numpy()
    ours = decibels(packages["fp16", "iOS16"], toy)
    assert ours - 10 < psnr(half, reference) < ours + 3, ours
