"""`--layout apple`: packages as Apple's Swift runtime feeds and reads them, and the schedules that it plays."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from hypersd_export import build_coreml
from hypersd_export.bundle.digest import digest_tree
from hypersd_export.bundle.manifest import verify_files
from hypersd_export.diffusion import FewStepPlan, PlanEntry, PlanFile, Solver
from hypersd_export.diffusion.apple import as_apple, play
from hypersd_export.errors import OptionError
from hypersd_export.export import export
from hypersd_export.graphs.spec import Shapes
from hypersd_export.job import open_job
from hypersd_export.runtime.coreml import open_packages
from hypersd_export.runtime.images import to_uint8
from hypersd_export.runtime.pipeline import Pipeline
from hypersd_export.spec import CoreMLFlags, PlanFlags
from hypersd_export.targets import Target
from hypersd_export.verify import apple
from hypersd_export.verify.coreml import InterpretedGraph
from hypersd_export.verify.metrics import psnr
from hypersd_export.verify.mil import open_package
from hypersd_export.verify.source import SourceRequest, open_source
from tests.tiny import COMPONENTS

pytest.importorskip("coremltools")

FILES = {
    "text_encoder": "TextEncoder", "unet": "Unet", "vae_decoder": "VAEDecoder", "vae_encoder": "VAEEncoder",
}  # fmt: skip
GUIDANCE = 3.0


@pytest.fixture(scope="module")
def apple_spec(tiny_spec):
    plan = PlanFlags(steps=(2, 1), scheduler="apple-dpmpp", guidance=GUIDANCE)
    flags = CoreMLFlags(layout="apple", attention="split-einsum", deployment_target="macOS13")
    return replace(tiny_spec, targets=(Target.COREML,), plan=plan, coreml=flags)


@pytest.fixture(scope="module")
def done(apple_spec, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_coreml, "run_apart", lambda asked, folder, *, progress: asked.run(folder, progress))
        return export(replace(apple_spec, out=tmp_path_factory.mktemp("apple") / "bundle"), isolate=False)


@pytest.fixture(scope="module")
def packages(done):
    return {name: open_package(done.path / name / f"{file}.mlpackage") for name, file in FILES.items()}


def test_names_shapes_and_types(packages):
    """Those of the table in graphs/apple.py, with guidance: two rows of the UNet, one of all else."""
    declared = {
        name: ({n: list(given.kind.shape) for n, given in f.inputs.items()}, set(f.outputs))
        for name, f in ((name, package.function()) for name, package in packages.items())
    }
    assert declared == {
        "text_encoder": ({"input_ids": [1, 16]}, {"last_hidden_state", "pooled_outputs"}),
        "unet": (
            {"sample": [2, 4, 4, 4], "timestep": [2], "encoder_hidden_states": [2, 32, 1, 16]},
            {"noise_pred"},
        ),
        "vae_decoder": ({"z": [1, 4, 4, 4]}, {"image"}),
        "vae_encoder": ({"x": [1, 3, 16, 16]}, {"latent"}),
    }
    for package in packages.values():
        features = [*package.file.model.description.input, *package.file.model.description.output]
        assert {feature.type.multiArrayType.dataType for feature in features} == {65568}  # FLOAT32
        assert package.file.model.specificationVersion == 7  # macOS 13


def test_the_packages_are_held_against_torch_by_our_names(done):
    parity = done.manifest.parity
    assert set(parity) == {*COMPONENTS, "image"}
    assert all(parity[name]["psnr_db"] > 55 for name in COMPONENTS)
    assert parity["image"]["psnr_db"] > 45
    record = done.manifest.targets["coreml"]
    assert record["components"]["unet"]["packages"] == ["unet/Unet.mlpackage"]
    assert record["ports"]["unet"]["encoder_hidden_states"] == {
        "name": "encoder_hidden_states", "axes": [0, 2, None, 1],
    }  # fmt: skip
    assert record["played_by_apple"] == {"2": "exact", "1": "exact"}
    verify_files(done.path)


def test_what_swift_does_with_them_is_the_golden_picture(done, packages):
    """`generateImages` in its own order: ids in float32, channels first states, both rows at once, the last x0."""
    golden = done.path / "golden"
    states = [
        packages["text_encoder"].evaluate({"input_ids": np.load(golden / f"{which}_ids.npy").astype(np.float32)})
        for which in ("negative", "prompt")
    ]
    rows = np.concatenate([state["last_hidden_state"] for state in states]).transpose(0, 2, 1)[:, :, None]

    def net(sample, t):
        feeds = {"sample": np.repeat(sample, 2, axis=0), "timestep": [t, t], "encoder_hidden_states": rows}
        found = packages["unet"].evaluate({name: np.asarray(value, np.float32) for name, value in feeds.items()})
        without, with_prompt = np.split(found["noise_pred"], 2)
        return without + np.float32(GUIDANCE) * (with_prompt - without)

    latents = play(net, np.load(golden / "initial_noise.npy"), 2)
    scale = json.loads((done.path / "vae_decoder" / "config.json").read_text())["scaling_factor"]
    picture = packages["vae_decoder"].evaluate({"z": (latents / scale).astype(np.float32)})["image"]
    from PIL import Image

    with Image.open(golden / "expected.png") as image:
        assert psnr(to_uint8(picture)[0], np.asarray(image)) > 45


class Interpreter:
    """The interpreter in the place of a Mac."""

    name = "interpreter"

    def load(self, package, digest, units, function=None):
        assert digest == digest_tree(package)
        graph = InterpretedGraph(package=open_package(package))
        return SimpleNamespace(inputs=graph.inputs, outputs=graph.outputs, predict=lambda feeds: graph.run(**feeds))


def test_the_runtime_of_a_mac_makes_them_ours_again(done):
    """By the manifest alone: which packages, their digests, and where our inputs and outputs lie in them."""
    runtime = open_packages(done.path, done.manifest.targets["coreml"], device=Interpreter())
    plans = PlanFile.from_json(json.loads((done.path / "plan.json").read_text()))
    pipeline = Pipeline(path=done.path, plans=plans, digest="", runtime=runtime)
    assert pipeline.golden().passed
    assert pipeline.provider == "interpreter, Core ML on all"
    assert list(runtime.graph("vae_encoder").inputs) == ["sample"]


def test_the_resources_folder(done):
    folder = done.path / "Resources"
    assert {path.name for path in folder.iterdir()} == {"vocab.json", "merges.txt", "README.md"}
    assert json.loads((folder / "vocab.json").read_text())["<|endoftext|>"] > 0
    assert (folder / "merges.txt").read_text().endswith("\n")  # Swift drops a last line without
    note = (folder / "README.md").read_text()
    for said in (
        "unet/Unet.mlpackage", "stepCount = 2", "guidanceScale = 3", "decoderScaleFactor = 0.5",
        "**not compiled here**", "| 1 | this bundle's plan, exactly |", "both rows of guidance",
    ):  # fmt: skip
        assert said in note


def test_ids_above_what_half_can_count_are_not_rounded(packages):
    """The tiny vocabulary has 518 ids; a real one 49,408, of which half precision has a few."""
    ops = packages["text_encoder"].function().block.operations
    first = next(op for op in ops if op.type == "cast")
    assert [item.name for item in first.inputs["x"].arguments] == ["input_ids"]
    assert first.outputs[0].type.tensorType.dataType == 23  # int32, straight from float32


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (PlanFlags(steps=(4,), scheduler="ddim"), r"only comes near it \(at 999, 749, 500, 250\); use --sched"),
        (PlanFlags(steps=(2,), scheduler="lcm"), "2 steps of lcm, .* adds no noise .* 1 to 3 steps$"),
        (PlanFlags(steps=(2,), scheduler="ddim", prediction_type="v_prediction"), "takes epsilon prediction"),
    ],
)  # fmt: skip
def test_plans_that_it_cannot_play_are_refused_before_anything_is_built(apple_spec, plan, said, tmp_path):
    with pytest.raises(OptionError, match=f"^--layout apple with .*{said}"):
        export(replace(apple_spec, plan=plan, out=tmp_path / "b"))


def test_a_near_plan_is_told_how_near(apple_spec, tmp_path, monkeypatch):
    flags = replace(apple_spec.coreml, approximate=True)
    plan = PlanFlags(steps=(2, 4), scheduler="ddim", guidance=GUIDANCE)
    spec = replace(apple_spec, coreml=flags, plan=plan, out=tmp_path / "b")
    said: list[str] = []

    class Said:
        def __getattr__(self, name):
            return lambda *given: said.append(str(given[0])) if name == "note" else None

    from hypersd_export.build import Workshop
    from hypersd_export.clock import Clock

    monkeypatch.setattr(build_coreml, "run_apart", lambda asked, folder, *, progress: asked.run(folder, progress))
    plays = build_coreml.played(Workshop(open_job(spec), Clock(Said()), spec.out))
    assert set(plays) == {2, 4}
    assert 30 < plays[4] < plays[2] < 100
    assert said == [
        f"{steps} steps as Apple's scheduler plays them: the picture is {db:.1f} dB from the plan's"
        for steps, db in plays.items()
    ]


def test_the_pictures_of_an_exact_plan_are_equal(tiny_base, done, monkeypatch):
    """By torch, along the table and along Apple's scheduler."""
    plan = as_apple(FewStepPlan(solver=Solver.DDIM, num_steps=3))
    plans = PlanFile(entries=(PlanEntry(plan=plan, table=plan.table(), source="test"),))
    source, shapes = open_source(SourceRequest(base=str(tiny_base))), Shapes(**done.manifest.options["shapes"])
    assert apple.psnr_as_played(source, plans, shapes, prompt="a cat", seed=1) == {}
    monkeypatch.setattr(apple, "plays_exactly", lambda plan: False)
    assert apple.psnr_as_played(source, plans, shapes, prompt="a cat", seed=1)[3] > 60
