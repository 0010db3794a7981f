"""Packages with several functions that share their weights, LoRAs beside weights, and whole bundles merged."""

import copy
import json
import shutil
import struct
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from hypersd_export import build_coreml, coreml_merge
from hypersd_export.bundle.digest import digest_tree
from hypersd_export.bundle.manifest import read_manifest, verify_files, write_manifest
from hypersd_export.diffusion import PlanFile
from hypersd_export.errors import OptionError, ParityError
from hypersd_export.export import export
from hypersd_export.graphs.attention import use_attention
from hypersd_export.graphs.kept_apart import keep_apart
from hypersd_export.graphs.spec import Graph
from hypersd_export.model.fuse import fuse
from hypersd_export.model.lora import Delta
from hypersd_export.proof import open_checked
from hypersd_export.refit import refit_spec
from hypersd_export.targets import Target
from hypersd_export.targets.coreml import convert, merge, package, vendor
from hypersd_export.verify.mil import open_package

pytest.importorskip("coremltools")
torch = pytest.importorskip("torch")
from diffusers import UNet2DConditionModel  # noqa: E402

from tests.lora_files import LCM_TARGETS, random_pairs  # noqa: E402


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """A convolution for pictures of two sizes, as two packages."""
    folder = tmp_path_factory.mktemp("sizes")
    torch.manual_seed(0)
    net = torch.nn.Conv2d(8, 64, 5)
    for name, side in (("small", 9), ("large", 17)):
        graph = Graph(name="net", module=net, inputs={"input": torch.randn(1, 8, side, side)}, output_names=("y",))
        convert.build(graph, folder / f"{name}.mlpackage", precision="fp16", deployment_target="iOS18")
    return {name: folder / f"{name}.mlpackage" for name in ("small", "large")}


def test_two_sizes_share_their_weights(sizes, tmp_path):
    before = {name: digest_tree(path) for name, path in sizes.items()}
    built = merge.build(sizes, tmp_path / "both.mlpackage")
    merge.build(sizes, tmp_path / "again.mlpackage")
    assert digest_tree(tmp_path / "both.mlpackage") == digest_tree(tmp_path / "again.mlpackage")
    assert {name: digest_tree(path) for name, path in sizes.items()} == before
    each = {name: package.facts(path) for name, path in sizes.items()}
    assert built["weight_bytes"] == each["small"]["weight_bytes"] == each["large"]["weight_bytes"]
    assert built["bytes_apart"] == each["small"]["bytes"] + each["large"]["bytes"] > 1.5 * built["bytes"]
    assert built["functions"] == ["small", "large"]
    both = open_package(tmp_path / "both.mlpackage")
    assert (set(both.functions), both.default) == ({"small", "large"}, "small")
    for (name, path), side in zip(sizes.items(), (9, 17), strict=True):
        x = np.random.default_rng(side).standard_normal((1, 8, side, side))
        found, exact = both.evaluate({"input": x}, function=name), open_package(path).evaluate({"input": x})
        assert np.array_equal(found["y"], exact["y"])


@pytest.mark.parametrize("attention", ["original", "split-einsum"])
def test_loras_beside_the_weights_are_those_fused_into_them(tiny_base, attention):
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet").eval()
    loras = []
    for seed, scale in ((0, 0.3), (1, -0.2)):
        pairs = random_pairs(unet, LCM_TARGETS, seed=seed)
        loras.append(({name: Delta(down=down, up=up, alpha=2.0) for name, (down, up) in pairs.items()}, scale))
    apart, fused = (copy.deepcopy(unet) for _ in range(2))
    keep_apart(apart, loras, component="unet")
    for deltas, scale in loras:
        fuse(fused, deltas, scale=scale, component="unet")
    use_attention(apart, attention)
    torch.manual_seed(0)
    config = unet.config
    states = torch.randn(1, 7, config.cross_attention_dim)
    x = torch.randn(1, config.in_channels, 8, 8)
    with torch.no_grad():
        mine, theirs, without = (net(x, 500, states).sample for net in (apart, fused, unet))
    assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert (theirs - without).abs().max() > 0.05 * theirs.abs().max()


def halved(path, name):
    """Make a weight of a package half as large, in its file."""
    ops = package.main_block(vendor.read_model(path / package.MODEL_FILE)).operations
    offset = next(op.attributes["val"].blobFileValue.offset for op in ops if name in op.outputs[0].name)
    data = bytearray((path / package.WEIGHTS_FILE).read_bytes())
    _, _, size, start = struct.unpack("<IIQQ", data[offset : offset + 24])
    weight = np.frombuffer(data, np.float16, size // 2, start)
    weight *= np.float16(0.5)
    (path / package.WEIGHTS_FILE).write_bytes(data)


@pytest.fixture(scope="module")
def bundles(tiny_spec, tmp_path_factory):
    """The tiny base (of the stages that other tests have built), and a copy with one weight of its UNet changed."""
    folder = tmp_path_factory.mktemp("merge")
    spec = replace(tiny_spec, targets=(Target.COREML,), verify=False, out=folder / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_coreml, "run_apart", lambda asked, folder, *, progress: asked.run(folder, progress))
        whole = export(spec, isolate=False).path
    small = shutil.copytree(whole, folder / "half-in")
    file = "unet/unet.mlpackage"
    halved(small / file, "conv_in_weight")
    (small / "golden" / "golden.json").write_text(
        (small / "golden" / "golden.json").read_text().replace('"min_psnr_db": 35.0', '"min_psnr_db": 5.0')
    )
    manifest = json.loads((small / "manifest.json").read_text())
    manifest["targets"]["coreml"]["components"]["unet"]["digests"] = [digest_tree(small / file)]
    (small / "manifest.json").unlink()
    del manifest["format"], manifest["files"]
    write_manifest(small, **manifest)
    return whole, small


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(coreml_merge, "run_apart", lambda asked, folder, *, progress: asked.run(folder, progress))


@pytest.fixture
def any_generation(monkeypatch):
    """The shared stages are for iOS 17, which coremltools merges too; a device would not load it."""
    monkeypatch.setattr(coreml_merge, "GENERATION", 16)


def test_two_bundles_as_one(bundles, tmp_path, any_generation):
    whole, half = bundles
    out = tmp_path / "both"
    coreml_merge.merge([f"whole={whole}", str(half)], out)
    manifest = verify_files(out)
    target = manifest.targets["coreml"]
    assert set(target["functions"]) == {"whole", "half_in"}
    assert target["functions"]["half_in"]["steps"] == [2, 4]
    merged = {name for name, entry in target["components"].items() if "functions" in entry}
    assert merged == {"unet"}
    unet = target["components"]["unet"]
    assert (
        1.0 < unet["bytes"] / package.facts(whole / "unet/unet.mlpackage")["bytes"] < 1.6
    )  # all but one weight is shared
    assert digest_tree(out / "vae_decoder") == digest_tree(whole / "vae_decoder")
    for name, folder in (("whole", whole), ("half_in", half)):
        assert manifest.parity[f"unet {name}"]["max_abs"] == 0
        mine = open_checked(out, runtime=None, provider=None, function=name)
        theirs = open_checked(folder, runtime=None, provider=None)
        assert mine.golden() == theirs.golden()
        assert mine.plans == PlanFile.from_json(json.loads((folder / "plan.json").read_text()))
    assert "| `half_in` | 16 x 16 | 2, 4 | none |" in (out / "README.md").read_text()
    swapped, manifests = (
        {"whole": half, "half_in": whole},
        {"whole": read_manifest(half), "half_in": read_manifest(whole)},
    )
    with pytest.raises(ParityError, match=r"^functions that are not their packages: unet whole .* dB in out_sample"):
        coreml_merge.prove(swapped, manifests, out, target)
    with pytest.raises(OptionError, match="function third is not in this bundle: choose whole, half_in"):
        open_checked(out, runtime=None, provider=None, function="third")
    with pytest.raises(OptionError, match="function whole is not in this bundle: it has none; merge bundles"):
        open_checked(whole, runtime=None, provider=None, function="whole")
    with pytest.raises(OptionError, match="has functions already: merge bundles that"):
        coreml_merge.merge([str(out), str(whole)], tmp_path / "more")
    with pytest.raises(OptionError, match="holds several exports; refit those that it was merged of"):
        refit_spec(out, ["x.safetensors"], tmp_path / "refitted")


def fake(deployment_target="iOS18", digest="aa", precision="fp16", targets=("coreml",), packages=("unet/u.mlpackage",)):
    target = {
        "deployment_target": deployment_target, "precision": precision, "layout": "plain", "ports": {},
        "components": {"unet": {"packages": list(packages), "digests": ["0"] * len(packages)}},
    }  # fmt: skip
    return SimpleNamespace(base={"digest": digest * 32, "name": "base"}, targets=dict.fromkeys(targets, target))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"deployment_target": "iOS17"},
            "B is for iOS17: packages with several functions need iOS18 or macOS15; export",
        ),
        (
            {"digest": "bb"},
            "B was made from base of sha256 bbbbbbbb…, and A from base of aaaaaaaa…: merge bundles of one",
        ),
        ({"precision": "fp32"}, "B has precision fp32, and A fp16: export them alike"),
        ({"deployment_target": "macOS15"}, "B has deployment target macOS15, and A iOS18: export them alike"),
        ({"targets": ("onnx",)}, "B was exported to onnx: merge bundles that hypersd-export --target coreml wrote"),
        ({"packages": ("unet/a.mlpackage", "unet/b.mlpackage")}, "B and A have other packages"),
    ],
)
def test_bundles_that_cannot_go_together(other, said):
    with pytest.raises(OptionError) as caught:
        coreml_merge.check_alike({"a": "A", "b": "B"}, {"a": fake(), "b": fake(**other)})
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_names_of_functions():
    found = coreml_merge.named(["one=/x/y", "/some/four-steps"])
    assert {name: str(path) for name, path in found.items()} == {"one": "/x/y", "four_steps": "/some/four-steps"}
    for texts, said in (
        (["a"], "give two bundles or more"),
        (["a=x", "a=y"], "another bundle is named a too; give NAME=y"),
        (["a=x", "4-steps"], "'4_steps' is no name of a function"),
    ):
        with pytest.raises(OptionError, match=said):
            coreml_merge.named(texts)
