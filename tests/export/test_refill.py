"""A graph with other weights and nothing traced is what a fresh export writes; what cannot follow is exported again."""

import json
import shutil
from dataclasses import replace

import onnx
import pytest
import torch

from hypersd_export.bundle.digest import sha256_file
from hypersd_export.component import ComponentTask
from hypersd_export.export import export
from hypersd_export.graphs.spec import Graph
from hypersd_export.model.base import open_base
from hypersd_export.refit import refit_spec
from hypersd_export.targets import onnx as target
from hypersd_export.targets import onnx_refill
from tests.lora_files import ATTENTION, kohya, random_pairs, write

UNET = "unet"


@pytest.fixture(scope="module")
def loras(tiny_base, tmp_path_factory):
    """LoRAs for the UNet that share some modules, and change others by themselves."""
    unet, folder = open_base(tiny_base).load_unet(torch.float32), tmp_path_factory.mktemp("loras")
    ends = {"one": (*ATTENTION, "conv1"), "two": ("to_q", "ff.net.0.proj", "conv2")}
    return {
        name: write(folder / f"{name}.safetensors", kohya(random_pairs(unet, end, seed=len(name)), UNET))
        for name, end in ends.items()
    }


@pytest.fixture(scope="module")
def first(tiny_spec, loras, tmp_path_factory):
    """A function: the export with one LoRA by precision, made once, and whether its weights are beside the graphs."""
    root, made = tmp_path_factory.mktemp("first"), {}

    def export_once(precision, beside):
        if precision not in made:
            folder = root / precision
            spec = replace(
                tiny_spec, verify=False, golden=False, jobs=1, precision=precision, loras=(str(loras["one"]),),
                out=folder / "one", cache_dir=folder / "cache",
            )  # fmt: skip
            with pytest.MonkeyPatch.context() as patch:
                if beside:
                    patch.setattr(target, "EXTERNAL_DATA_BYTES", 0)
                made[precision] = (
                    export(spec),
                    export(replace(spec, loras=(str(loras["two"]),), out=folder / "two", cache_dir=others(folder))),
                    spec,
                )
        return made[precision]

    return export_once


def others(folder):
    """The cache of an export, but for its UNet."""
    return shutil.copytree(folder / "cache", folder / "other", ignore=shutil.ignore_patterns("onnx-*unet*"))


def refitted(spec, lora, out):
    made = refit_spec(spec.out, [str(lora)], out, base=spec.base, cache_dir=spec.cache_dir)
    return export(replace(made, jobs=1))


def same_files(one, other):
    names = {path.relative_to(one.path) for path in one.path.rglob("*") if path.is_file()}
    assert names == {path.relative_to(other.path) for path in other.path.rglob("*") if path.is_file()}
    stamped = {"manifest.json", "README.md"}
    for name in names:
        assert name.name in stamped or sha256_file(one.path / name) == sha256_file(other.path / name), name


def never(*_, **__):
    raise AssertionError("nothing is to be traced")


@pytest.mark.parametrize(("precision", "beside"), [("fp32", False), ("fp16", True)])
def test_a_refitted_graph_is_that_of_a_fresh_export(first, loras, tmp_path, monkeypatch, precision, beside):
    one, two, spec = first(precision, beside)
    spec = replace(spec, cache_dir=shutil.copytree(spec.cache_dir, tmp_path / "cache"))
    unets = [
        entry for entry in spec.cache_dir.glob("onnx*-unet*/*") if (entry / "files" / onnx_refill.ORIGINS).is_file()
    ]
    monkeypatch.setattr(ComponentTask, "_traced", never)
    monkeypatch.setattr(target, "EXTERNAL_DATA_BYTES", -1)  # of no matter: the weights are where they were
    again = refitted(spec, loras["two"], tmp_path / "again")
    same_files(again, two)
    assert again.manifest.targets == two.manifest.targets
    data = target.DATA_FILE if beside else target.MODEL_FILE
    assert sha256_file(one.path / UNET / data) != sha256_file(again.path / UNET / data)
    assert (again.path / UNET / target.DATA_FILE).is_file() == beside
    assert not list(again.path.rglob(onnx_refill.ORIGINS))
    assert len(unets) == 1
    shutil.rmtree(unets[0])  # so that only what was refitted can be taken
    same_files(refitted(replace(spec, out=again.path), loras["one"], tmp_path / "back"), one)


def test_without_the_former_graph_it_is_exported_again(first, loras, tmp_path):
    _, two, spec = first("fp32", False)
    cache = shutil.copytree(spec.cache_dir.with_name("other"), tmp_path / "cache")
    shutil.rmtree(cache / "onnx-unet")
    same_files(refitted(replace(spec, cache_dir=cache), loras["two"], tmp_path / "again"), two)


def test_a_graph_that_does_not_hold_a_weight_by_itself_is_exported_again(first, loras, tmp_path):
    _, two, spec = first("fp32", False)
    cache = shutil.copytree(spec.cache_dir, tmp_path / "cache")
    (stage,) = (cache / "onnx-unet").glob("*/files")
    origins = json.loads((stage / onnx_refill.ORIGINS).read_text())
    changed = {name: origin for name, origin in origins.items() if not origin[0].endswith("to_q.weight")}
    assert len(changed) < len(origins)
    (stage / onnx_refill.ORIGINS).write_text(json.dumps(changed))
    entry = json.loads((stage.parent / "stage.json").read_text())
    entry["files"][onnx_refill.ORIGINS] = sha256_file(stage / onnx_refill.ORIGINS)
    (stage.parent / "stage.json").write_text(json.dumps(entry))
    same_files(refitted(replace(spec, cache_dir=cache), loras["two"], tmp_path / "again"), two)


class Layers(torch.nn.Module):
    """Weights in every way that a graph may have them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name in ("plain", "twin", "other", "doubled", "twice"):
            self.add_module(name, torch.nn.Linear(6, 6))
        self.conv = torch.nn.Conv2d(1, 2, 3)
        with torch.no_grad():
            self.other.weight.copy_(self.twin.weight)

    def forward(self, x):
        y = self.plain(x) + self.twin(x) * self.other(x) + torch.nn.functional.linear(x, self.doubled.weight * 2)
        y = y + self.twice(self.twice(x))
        return y, self.conv(x[None])


def built(module, folder):
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    target.build(Graph(name="layers", module=module, inputs={"x": x}, output_names=("y", "z")), folder)
    return folder


def test_only_weights_that_the_graph_has_for_itself_can_be_changed(tmp_path):
    module = Layers().eval().requires_grad_(False)
    old = built(module, tmp_path / "old")
    found = {origin[0] for origin in json.loads((old / onnx_refill.ORIGINS).read_text()).values()}
    assert {"plain.weight", "plain.bias", "conv.weight", "conv.bias", "twin.bias", "other.bias"} <= found
    assert not {"twin.weight", "other.weight", "doubled.weight", "twice.weight"} & found
    parameters = dict(module.named_parameters())
    for name in ("twin", "other", "doubled", "twice"):
        wanted = {each: parameters[each] for each in ("plain.weight", f"{name}.weight")}
        assert onnx_refill.refill(old, wanted, tmp_path / "new") is None
    assert not (tmp_path / "new").exists()
    with torch.no_grad():
        for name in ("plain.weight", "conv.weight"):
            parameters[name].normal_(generator=torch.Generator().manual_seed(2))
    wanted = {name: parameters[name] for name in ("plain.weight", "conv.weight")}
    (tmp_path / "new").mkdir()
    assert onnx_refill.refill(old, wanted, tmp_path / "new") == {}
    fresh = built(module, tmp_path / "fresh")
    assert (tmp_path / "new" / target.MODEL_FILE).read_bytes() == (fresh / target.MODEL_FILE).read_bytes()
    onnx.checker.check_model(tmp_path / "new" / target.MODEL_FILE, full_check=True)
    (old / onnx_refill.ORIGINS).unlink()
    assert onnx_refill.refill(old, wanted, tmp_path / "none") is None
