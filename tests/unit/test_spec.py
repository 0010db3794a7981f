"""The options of hypersd-export as a spec: what is parsed, what is refused, in one line."""

import json
from pathlib import Path

import pytest

from hypersd_export.errors import OptionError
from hypersd_export.spec import ExportSpec, PlanFlags, parse_ints, parse_loras, parse_size, parse_targets
from hypersd_export.targets import Target, precision_of


def test_defaults_are_the_builtin_base_to_onnx_fp32():
    spec = ExportSpec()
    assert (spec.targets, spec.base, spec.loras, spec.batch) == ((Target.ONNX,), "builtin", None, 1)
    assert (spec.precision, spec.precision_of(Target.ONNX)) == (None, "fp32")
    assert (spec.opset, spec.out, spec.verify, spec.allow_pickle) == (20, Path("bundle"), True, False)


def test_a_spec_is_plain_json():
    spec = ExportSpec(plan=PlanFlags(steps=(4, 2)), size=(64, 32), cache_dir=Path("c"), loras=("a.safetensors:0.5",))
    data = json.loads(json.dumps(spec.to_json()))
    assert data["plan"]["steps"] == [4, 2]
    assert data["size"] == [64, 32]
    assert data["targets"] == ["onnx"]
    assert data["cache_dir"] == "c"


@pytest.mark.parametrize(
    ("text", "numbers"), [(None, None), ("4", (4,)), ("1,2,4,8", (1, 2, 4, 8)), ("-1", (-1,)), (" 4 , 2", (4, 2))]
)
def test_parse_ints(text, numbers):
    assert parse_ints("--steps", text) == numbers


@pytest.mark.parametrize("text", ["", "four", "4,", "1.5", "4,4"])
def test_parse_ints_refuses(text):
    with pytest.raises(OptionError, match=r"^--steps "):
        parse_ints("--steps", text)


@pytest.mark.parametrize(
    ("text", "size"), [(None, None), ("512x768", (512, 768)), ("64X32", (64, 32)), ("8×16", (8, 16))]
)
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["512", "512x", "x512", "512*512", "-8x8", "8x8x8"])
def test_parse_size_refuses(text):
    with pytest.raises(OptionError, match="WIDTHxHEIGHT"):
        parse_size(text)


def test_parse_loras():
    assert parse_loras(None) is None
    assert parse_loras([]) is None
    assert parse_loras(["none"]) == ()
    assert parse_loras(["a", "b:0.5"]) == ("a", "b:0.5")
    with pytest.raises(OptionError, match="--lora none"):
        parse_loras(["none", "a"])


def test_parse_targets():
    assert parse_targets(None) == (Target.ONNX,)
    assert parse_targets(["onnx", "onnx"]) == (Target.ONNX,)
    with pytest.raises(OptionError, match="--target onx: unknown, choose from onnx, tensorrt, coreml and all"):
        parse_targets(["onx"])
    assert parse_targets(["coreml", "all"]) == (Target.COREML, Target.ONNX, Target.TENSORRT)


def test_each_target_has_its_own_default_precision_and_refuses_what_it_lacks():
    assert {target: precision_of(target, None) for target in Target} == {
        Target.ONNX: "fp32", Target.TENSORRT: "fp16", Target.COREML: "fp16",
    }  # fmt: skip
    for target in Target:
        with pytest.raises(OptionError, match=rf"^--precision int8: {target} is written in "):
            precision_of(target, "int8")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": 0}, "--batch 0: from 1 to 64"),
        ({"batch": 65}, "--batch 65"),
        ({"size": (0, 64)}, "--size 0x64"),
        ({"size": (64, 99999)}, "--size 64x99999"),
        ({"opset": 17}, "--opset 17: torch.onnx writes 18 to 23"),
        ({"opset": 24}, "--opset 24"),
        ({"precision": "int8"}, "--precision int8: onnx is written in fp32 or fp16 only as yet"),
        ({"plan": PlanFlags(steps=(0,))}, "--steps 0: a plan has from 1 to 1000 steps"),
        ({"plan": PlanFlags(steps=(-1,))}, "--steps -1"),
        ({"plan": PlanFlags(steps=(4, 1001))}, "--steps 1001"),
        ({"plan": PlanFlags(steps=(4,), timesteps=(999, 499))}, "--steps 4 with 2 --timesteps"),
        ({"plan": PlanFlags(timesteps=(1000, 499))}, "--timesteps 1000,499: each from 0 to 999"),
        ({"plan": PlanFlags(eta=1.5)}, "--eta 1.5"),
        ({"plan": PlanFlags(eta=float("nan"))}, "--eta nan"),
        ({"plan": PlanFlags(guidance=-1.0)}, "--guidance -1"),
        ({"plan": PlanFlags(guidance=float("inf"))}, "--guidance inf"),
    ],
)
def test_impossible_values_are_refused_in_one_line(values, message):
    with pytest.raises(OptionError, match=r"^" + message.replace("(", r"\(")) as error:
        ExportSpec(**values)
    assert "\n" not in str(error.value)
