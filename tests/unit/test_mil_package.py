"""verify/mil as a reader of packages: flexible shapes, several functions, and one line for all that can be wrong."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch

from hypersd_export.errors import BundleError, MissingBackend, OptionError
from hypersd_export.verify.mil import open_package
from hypersd_export.verify.mil.file import NAMES, RECORD_SENTINEL
from tests.mil_programs import save_program

ct = pytest.importorskip("coremltools")
mb = pytest.importorskip("coremltools.converters.mil").Builder

X = np.arange(12, dtype=np.float32).reshape(3, 4)
WEIGHT = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)


def convolution(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.SiLU()).eval()


def converted(net, example, folder, name, dynamic=None, **options):
    """`net` through torch.export and coremltools, in float32, saved."""
    exported = torch.export.export(net, (example,), dynamic_shapes=dynamic).run_decompositions({})
    options = {"minimum_deployment_target": ct.target.iOS18, **options}
    model = ct.convert(exported, compute_precision=ct.precision.FLOAT32, skip_model_load=True, **options)
    path = folder / f"{name}.mlpackage"
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A linear layer whose weight lies in the weights file, and whose output is `out`."""
    return save_program(lambda x: mb.linear(x=x, weight=WEIGHT, name="out"), [X], tmp_path_factory.mktemp("linear"))


@pytest.fixture
def broken(linear, tmp_path):
    """A copy that may be damaged, and its spec with the function that writes it back."""
    from coremltools.proto import Model_pb2

    path = shutil.copytree(linear, tmp_path / "broken.mlpackage")
    file = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    spec = Model_pb2.Model.FromString(file.read_bytes())
    return path, spec, lambda: file.write_bytes(spec.SerializeToString())


def only_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def test_a_range_of_sizes(tmp_path):
    net, sides = convolution(), (torch.export.Dim("h", min=4, max=16), torch.export.Dim("w", min=4, max=16))
    shape = (1, 3, ct.RangeDim(4, 16, 8), ct.RangeDim(4, 16, 8))
    path = converted(
        net, torch.randn(1, 3, 8, 8), tmp_path, "range", ({2: sides[0], 3: sides[1]},),
        inputs=[ct.TensorType(name="x", shape=shape)],
    )  # fmt: skip
    package = open_package(path)
    assert str(package.function().inputs["x"]) == "fp32 [1, 3, 4…16, 4…16]"
    for height, width in ((4, 4), (8, 8), (5, 16)):
        x = torch.randn(1, 3, height, width)
        (out,) = package.evaluate({"x": x.numpy()}).values()
        np.testing.assert_allclose(out, net(x).detach().numpy(), atol=1e-6)
    with pytest.raises(OptionError, match=re.escape("input x is fp32 [1, 3, 4…16, 4…16], not [1, 3, 17, 8]")):
        package.evaluate({"x": np.zeros((1, 3, 17, 8), np.float32)})


def test_a_list_of_sizes(tmp_path):
    net, sides = convolution(), (torch.export.Dim("h", min=4, max=16), torch.export.Dim("w", min=4, max=16))
    shapes = ct.EnumeratedShapes(shapes=[(1, 3, 8, 8), (1, 3, 16, 4)], default=(1, 3, 8, 8))
    path = converted(
        net, torch.randn(1, 3, 8, 8), tmp_path, "listed", ({2: sides[0], 3: sides[1]},),
        inputs=[ct.TensorType(name="x", shape=shapes)],
    )  # fmt: skip
    package = open_package(path)
    assert set(package.function().inputs["x"].listed) == {(1, 3, 8, 8), (1, 3, 16, 4)}
    for size in ((8, 8), (16, 4)):
        x = torch.randn(1, 3, *size)
        (out,) = package.evaluate({"x": x.numpy()}).values()
        np.testing.assert_allclose(out, net(x).detach().numpy(), atol=1e-6)
    with pytest.raises(OptionError, match="one of the shapes") as error:
        package.evaluate({"x": np.zeros((1, 3, 8, 16), np.float32)})
    assert "not [1, 3, 8, 16]" in only_line(error)


def test_several_functions_each_with_its_own_shapes(tmp_path):
    net = convolution()
    for side in (4, 8):
        converted(net, torch.randn(1, 3, side, side), tmp_path, f"s{side}", inputs=[ct.TensorType(name="x")])
    sides, shapes = (torch.export.Dim("h", min=4, max=16), torch.export.Dim("w", min=4, max=16)), (1, 3, 8, 16)
    listed = ct.EnumeratedShapes(shapes=[shapes, (1, 3, 16, 8)], default=shapes)
    converted(
        net, torch.randn(shapes), tmp_path, "flexible", ({2: sides[0], 3: sides[1]},),
        inputs=[ct.TensorType(name="x", shape=listed)],
    )  # fmt: skip
    descriptor = ct.utils.MultiFunctionDescriptor()
    for name in ("s4", "s8", "flexible"):
        descriptor.add_function(
            str(tmp_path / f"{name}.mlpackage"), src_function_name="main", target_function_name=name
        )
    descriptor.default_function_name = "s8"
    ct.utils.save_multifunction(descriptor, str(tmp_path / "many.mlpackage"))
    package = open_package(tmp_path / "many.mlpackage")
    assert package.default == "s8"
    assert set(package.functions) == {"s4", "s8", "flexible"}
    assert not package.function("s4").inputs["x"].listed
    for function, size in ((None, (8, 8)), ("s4", (4, 4)), ("flexible", (16, 8))):
        x = torch.randn(1, 3, *size)
        (out,) = package.evaluate({"x": x.numpy()}, function=function).values()
        np.testing.assert_allclose(out, net(x).detach().numpy(), atol=1e-6)
    with pytest.raises(OptionError, match="input x is fp32"):
        package.evaluate({"x": np.zeros((1, 3, 8, 8), np.float32)}, function="s4")
    with pytest.raises(OptionError, match="has no function s2: choose from flexible, s4, s8"):
        package.evaluate({"x": np.zeros((1, 3, 8, 8), np.float32)}, function="s2")


def test_other_weights_in_place_of_the_packages(tmp_path):
    """In any order, several at once, and with a use in a nested block: what a package with those weights gives."""
    rng = np.random.default_rng(1)
    first, second = (rng.standard_normal((4, 4)).astype(np.float16) for _ in range(2))
    others = {"first": first + np.float16(1), "second": -second}

    def body(weights):
        def net(x):
            kept = {name: mb.const(val=weights[name], name=name) for name in ("first", "second")}
            hidden = mb.relu(x=mb.matmul(x=x, y=kept["first"]))
            end = mb.matmul(x=hidden, y=kept["second"])
            positive = mb.greater(x=mb.reduce_sum(x=x, axes=[0, 1]), y=np.float16(0))
            return mb.cond(pred=positive, _true_fn=lambda: mb.matmul(x=end, y=kept["first"]), _false_fn=lambda: end)

        return net

    plain = {"first": first, "second": second}
    x = X.astype(np.float16)
    changes = [{"second": others["second"]}, {"first": others["first"]}, others, {"second": others["second"]}, {}]
    package = open_package(save_program(body(plain), [x], tmp_path, "iOS17"))
    found = list(package.evaluate_with({"x0": x}, changes))
    for change, outputs in zip(changes, found, strict=True):
        own = open_package(save_program(body(plain | change), [x], tmp_path, "iOS17", name="own"))
        for value, expected in zip(outputs.values(), own.evaluate({"x0": x}).values(), strict=True):
            assert np.array_equal(value, expected), list(change)


def test_every_element_type_of_the_format_is_named_but_the_small_floats():
    from coremltools.proto import MIL_pb2

    short = {"FLOAT16": "fp16", "FLOAT32": "fp32", "FLOAT64": "fp64"}
    known = {number: short.get(name, name.lower()) for name, number in MIL_pb2.DataType.items()}
    missing = {known[number] for number in set(known) - set(NAMES)}
    assert missing == {"unused_type", "bfloat16", "float8e4m3fn", "float8e5m2"}
    assert {number: known[number] for number in NAMES} == NAMES


def test_inputs_are_cast_to_the_declared_type_where_nothing_is_lost(tmp_path):
    ids = np.array([3, 1, 2], dtype=np.int32)
    table = np.arange(8, dtype=np.float16).reshape(4, 2)
    package = open_package(save_program(lambda i: mb.gather(x=table, indices=i), [ids], tmp_path))
    (name,) = package.function().inputs
    for given in (ids, ids.astype(np.int64), ids.astype(np.float32), ids.tolist()):
        (out,) = package.evaluate({name: given}).values()
        np.testing.assert_array_equal(out, table[ids])
    for bad, kind in (
        (ids + 0.5, "float64"), (ids * np.nan, "float64"), (ids.astype(np.int64) + 2**40, "int64"),
        (ids * 1j, "complex128"), (ids.astype("<U1"), "<U1"),
    ):  # fmt: skip
        with pytest.raises(OptionError) as error:
            package.evaluate({name: bad})
        assert only_line(error).endswith(f"input {name} is int32, which cannot hold this {kind}")


def test_fp32_rounding_leaves_half_values_unrounded(tmp_path):
    x = np.array([1.0001], dtype=np.float32)
    package = open_package(save_program(lambda a: mb.add(x=a, y=np.float16(1)), [x.astype(np.float16)], tmp_path))
    (name,) = package.function().inputs
    (half,), (full,) = (package.evaluate({name: x}, rounding=r).values() for r in ("fp16", "fp32"))
    assert (half.dtype, full.dtype) == (np.float16, np.float32)
    assert half == np.float16(2.0)
    assert full == x + 1


@pytest.mark.parametrize(
    ("inputs", "options", "says"),
    [
        ({}, {}, "takes x0, not nothing"),
        ({"x0": X, "y": X}, {}, "takes x0, not x0, y"),
        ({"x": X}, {}, "takes x0, not x"),
        ({"x0": X[:2]}, {}, "input x0 is fp32 [3, 4], not [2, 4]"),
        ({"x0": X.ravel()}, {}, "input x0 is fp32 [3, 4], not [12]"),
        ({"x0": X.astype(str)}, {}, "input x0 is fp32, which cannot hold this <U32"),
        ({"x0": X}, {"rounding": "bf16"}, "rounding bf16: choose from fp16 and fp32"),
        ({"x0": X}, {"function": "f"}, "has no function f: choose from main"),
    ],
)
def test_inputs_that_do_not_fit(inputs, options, says, linear):
    with pytest.raises(OptionError) as error:
        open_package(linear).evaluate(inputs, **options)
    assert only_line(error).endswith(says)


def test_a_folder_that_is_no_package(tmp_path, linear):
    with pytest.raises(BundleError, match=r"none.mlpackage is missing: export it again"):
        open_package(tmp_path / "none.mlpackage")
    with pytest.raises(BundleError, match=r"has no Manifest.json \(give the .mlpackage folder\)"):
        open_package(tmp_path)
    for text in ("{", "[]", json.dumps({"rootModelIdentifier": "a", "itemInfoEntries": {}})):
        (tmp_path / "Manifest.json").write_text(text)
        with pytest.raises(BundleError, match=r"the package cannot be read .*: export it again") as error:
            open_package(tmp_path)
        only_line(error)
    damaged = shutil.copytree(linear, tmp_path / "damaged.mlpackage")
    file = damaged / "Data" / "com.apple.CoreML" / "model.mlmodel"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(BundleError, match="the package cannot be read"):
        open_package(damaged)
    file.unlink()
    with pytest.raises(BundleError, match="the package cannot be read"):
        open_package(damaged)


def test_a_model_that_is_no_ml_program(broken):
    path, spec, write = broken
    spec.neuralNetwork.SetInParent()
    write()
    with pytest.raises(BundleError, match="holds a neuralNetwork, not an ML program: convert it as mlprogram"):
        open_package(path)
    spec.mlProgram.SetInParent()
    write()
    with pytest.raises(BundleError, match="has no function: export it again"):
        open_package(path)


def test_a_function_without_ops_for_its_opset(broken):
    path, spec, write = broken
    spec.mlProgram.functions["main"].opset = "CoreML99"
    write()
    with pytest.raises(BundleError, match="function main has no ops for its opset 'CoreML99': export it again"):
        open_package(path)


def test_no_coremltools(linear, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools.proto", None)
    with pytest.raises(MissingBackend, match=r"reading a Core ML package needs .* pip install 'hypersd\[coreml\]'"):
        open_package(linear)


def refused(path, says):
    package = open_package(path)
    with pytest.raises(BundleError, match=says) as error:
        package.evaluate({"x0": X})
    only_line(error)


def operations(spec):
    function = spec.mlProgram.functions["main"]
    return function.block_specializations[function.opset].operations


def test_a_weights_file_that_is_missing_empty_cut_short_or_overwritten(broken):
    path, spec, write = broken
    weights = path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    refused(path, r"weight.bin holds no whole weight at byte \d+: export it again")
    weights.write_bytes(whole[:100])
    refused(path, r"weight.bin ends at byte 100, before the weight at \d+: export it again")
    weights.write_bytes(whole.replace(RECORD_SENTINEL.to_bytes(4, "little"), b"\0\0\0\0"))
    refused(path, r"holds no whole weight at byte \d+")
    weights.write_bytes(b"")
    refused(path, r"weights file @model_path/weights/weight.bin is empty: copy the whole folder")
    weights.unlink()
    refused(path, r"weights file @model_path/weights/weight.bin is missing: copy the whole folder")
    for weight in (op for op in operations(spec) if "blobFileValue" in str(op)):
        weight.attributes["val"].blobFileValue.fileName = "@model_path/../../../outside.bin"
    write()
    refused(path, r"weights file .*outside.bin lies outside of the package")


def test_a_weight_of_another_size_than_declared(broken):
    path, spec, write = broken
    weight = next(op for op in operations(spec) if "blobFileValue" in str(op))
    weight.attributes["val"].type.tensorType.dimensions[0].constant.size = 15
    write()
    refused(path, r"a weight of type fp32 \[15, 4\] has 256 bytes, not 240: export it again")


def test_an_op_that_is_unknown(broken):
    path, spec, write = broken
    next(op for op in operations(spec) if op.type == "linear").type = "crumple"
    write()
    refused(path, "the interpreter has no op crumple: such a package can be evaluated on a Mac only")


def test_an_op_that_cannot_run(broken):
    path, spec, write = broken
    linear = next(op for op in operations(spec) if op.type == "linear")
    linear.type = "matmul"
    write()
    refused(path, r"op out \(matmul\) fails: its input y is missing: export it again")
    linear.type = "linear"
    linear.inputs["x"].arguments[0].name = "nothing"
    write()
    refused(path, "the value nothing is used before any op makes it: export it again")
    linear.inputs["x"].arguments[0].name = "x0"
    linear.inputs["weight"].arguments[0].name = "x0"
    del linear.inputs["bias"]
    write()
    refused(path, r"op out \(linear\) has the shape \[3, 3\], the package declares fp32 \[3, 16\]: export it again")


def test_an_element_type_that_is_not_held(broken):
    path, spec, write = broken
    linear = next(op for op in operations(spec) if op.type == "linear")
    linear.outputs[0].type.tensorType.dataType = {name: number for number, name in NAMES.items()}["fp64"]
    write()
    refused(path, "the interpreter holds no fp64: convert without it")
