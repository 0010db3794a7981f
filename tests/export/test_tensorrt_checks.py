"""The checks of a parsed network, a profile and the parser's errors; nothing here needs the library."""

from dataclasses import replace

import pytest

from hypersd_export.bundle.engines import EngineTensor
from hypersd_export.errors import BuildError, OptionError
from hypersd_export.targets.tensorrt_checks import (
    Layer,
    check_profile,
    count_types,
    interface_problems,
    listed,
    parse_errors,
    precision_problems,
    read_onnx,
)
from tests.export.tensorrt_graphs import NODES, small_net, two_inputs

OPS = {"mul": "Mul", "sin": "Sin", "conv": "Conv", "soft": "Softmax", "up": "Cast", "down": "Cast"}


def layer(node, kind, inputs, output, dtype, **more):
    return Layer(name=node, kind=kind, node=node, inputs=inputs, outputs=(output,), dtypes=(dtype,), **more)


def net(*, conv="HALF", soft="FLOAT", weight="HALF"):
    """timestep · frequencies → sine → cast → convolution → softmax between casts."""
    return [
        Layer(name="freq", kind="CONSTANT", outputs=("freq",), dtypes=("FLOAT",), size=4),
        layer("mul", "ELEMENTWISE", ("timestep", "freq"), "angles", "FLOAT"),
        layer("sin", "UNARY", ("angles",), "sines", "FLOAT"),
        layer("down", "CAST", ("sines",), "time", "HALF"),
        Layer(name="kernel", kind="CONSTANT", outputs=("kernel",), dtypes=(weight,), size=36),
        layer("conv", "CONVOLUTION", ("time", "kernel"), "x", conv),
        layer("up", "CAST", ("x",), "wide", "FLOAT"),
        layer("soft", "SOFTMAX", ("wide",), "y", soft),
    ]


def test_an_fp16_network_as_intended():
    assert precision_problems(net(), ["soft"], OPS) == []
    assert count_types(net()) == {"FLOAT": 4, "HALF": 2}


@pytest.mark.parametrize(
    ("changes", "allowed", "said"),
    [
        ({}, [], "node soft (Softmax) is float32 and ought to be fp16"),
        ({"soft": "HALF"}, ["soft"], "node soft (Softmax) is fp16 and ought to be float32"),
        ({"conv": "FLOAT"}, ["soft"], "node conv (Conv) is float32 and ought to be fp16"),
        ({}, ["soft", "gone"], "node gone, which ought to be float32, is not in the network"),
    ],
)
def test_a_layer_of_another_precision(changes, allowed, said):
    assert precision_problems(net(**changes), allowed, OPS) == [said]


def test_what_joins_the_parts_of_a_single_graph_may_be_float32():
    glue = [*net(), layer("x.2", "ELEMENTWISE", ("y", "y"), "x.2", "FLOAT")]
    assert len(precision_problems(glue, ["soft"], OPS)) == 1
    assert precision_problems(glue, ["soft"], OPS, glue_nodes=["x.2", "loop", "gather"]) == []


def test_what_leads_to_a_sine_may_be_float32_but_nothing_behind_it():
    behind = [*net(), layer("late", "ELEMENTWISE", ("sines", "sines"), "late", "FLOAT")]
    assert precision_problems(behind, ["soft"], OPS) == ["node late (elementwise) is float32 and ought to be fp16"]
    without = [replace(one, node="") if one.name == "sin" else one for one in net()]
    assert len(precision_problems(without, ["soft"], OPS)) == 2


def test_a_float32_weight_that_is_cast_down():
    moved = [
        Layer(name="w", kind="CONSTANT", outputs=("w",), dtypes=("FLOAT",), size=36),
        layer("turn", "SHUFFLE", ("w",), "turned", "FLOAT"),
        layer("cast", "CAST", ("turned",), "half", "HALF"),
    ]
    assert precision_problems(moved, [], OPS) == ["weight w is stored in float32 and cast to fp16"]
    assert precision_problems([replace(moved[0], size=1), *moved[1:]], [], OPS) == []


def test_what_is_read_of_an_onnx_file(tmp_path):
    facts = read_onnx(small_net(tmp_path / "m.onnx", batch="n", external=True))
    assert facts.inputs == (
        EngineTensor(name="sample", shape=(-1, 4, 8, 8), dtype="float16"),
        EngineTensor(name="timestep", shape=(1, 1), dtype="float32"),
    )
    assert facts.outputs == (EngineTensor(name="out_sample", shape=(-1, 4, 8, 8), dtype="float16"),)
    assert facts.symbols == {"sample": ("n", "", "", ""), "timestep": ("", "")}
    assert set(facts.ops) == set(NODES) - {"grow"}
    (tmp_path / "bad.onnx").write_bytes(b"not one")
    with pytest.raises(BuildError, match="is no ONNX file that can be read"):
        read_onnx(tmp_path / "bad.onnx")


def test_the_interface_is_the_graphs(tmp_path):
    facts = read_onnx(small_net(tmp_path / "m.onnx"))
    inputs, outputs = list(facts.inputs), list(facts.outputs)
    assert interface_problems(facts, inputs, outputs) == []
    assert "inputs are timestep, sample and not sample, timestep" in interface_problems(facts, inputs[::-1], outputs)[0]
    narrow = [replace(outputs[0], shape=(1, 4, 8, 9))]
    assert interface_problems(facts, inputs, narrow) == [
        "output out_sample is float16 [1, 4, 8, 9] and not float16 [1, 4, 8, 8]"
    ]
    wide = [replace(inputs[0], dtype="float32"), inputs[1]]
    assert "input sample is float32 [1, 4, 8, 8] and not float16" in interface_problems(facts, wide, outputs)[0]


def square(*batches):
    return tuple((batch, 4) for batch in batches)


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ({"a": square(1, 2, 4), "b": square(1, 2, 4)}, None),
        ({"a": square(1, 2, 4)}, "input b has free dimensions"),
        ({"a": square(1, 2, 4), "b": square(1, 2, 3)}, "both are 'n'"),
        ({"a": square(1, 2), "b": square(1, 2)}, "has to be three shapes of 2 dimensions"),
        ({"a": ((1,), (1,), (1,)), "b": square(1, 1, 1)}, "has to be three shapes"),
        ({"a": square(2, 1, 4), "b": square(2, 1, 4)}, "does not rise along axis 0"),
        ({"a": square(0, 1, 4), "b": square(0, 1, 4)}, "does not rise along axis 0"),
        ({"a": ((1, 4), (1, 4), (1, 5)), "b": square(1, 1, 1)}, "changes axis 1, which is 4"),
        ({"a": square(1, 2, 4), "b": square(1, 2, 4), "c": square(1, 2, 4)}, "no input with free dimensions"),
    ],
)
def test_a_profile_fits_the_graph_and_itself(tmp_path, profile, said):
    facts = read_onnx(two_inputs(tmp_path / "m.onnx", ["n", 4], ["n", 4]))
    if said is None:
        check_profile(facts, profile)
        return
    with pytest.raises(OptionError, match=said) as error:
        check_profile(facts, profile)
    assert "\n" not in str(error.value)


def test_a_static_graph_needs_no_profile_and_axes_without_a_name_go_together(tmp_path):
    static = read_onnx(two_inputs(tmp_path / "s.onnx", [2, 4], [2, 4]))
    check_profile(static, {})
    with pytest.raises(OptionError, match="no input with free dimensions"):
        check_profile(static, {"a": square(2, 2, 2)})
    free = read_onnx(two_inputs(tmp_path / "f.onnx", [None, 4], [None, 4]))
    with pytest.raises(OptionError, match="both are 'axis 0'"):
        check_profile(free, {"a": square(1, 1, 4), "b": square(1, 1, 3)})


def test_parser_errors_become_one_line():
    usage = (
        "Invalid Node - add\nITensor::getDimensions: Error Code 4: API Usage Error (add: types differ. "
        "In validateTypes at /_src/a.cpp:40)\n[x.cpp::250] Error Code 1: Cuda Runtime (cudaError 35: no)"
    )
    line = parse_errors([("add", "Add", usage), ("", "Foo", 'creator && "Plugin not found"'), ("", "", "Failed.")])
    assert line == "node add (Add): types differ.; node without a name (Foo): Plugin not found; the file: Failed."
    assert listed([str(number) for number in range(9)]) == "0; 1; 2; 3; and 5 more"
