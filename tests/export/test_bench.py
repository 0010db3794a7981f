"""`hypersd-bench` on a bundle that was exported: the same weights in torch draw the same picture, in the same race."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmarks.bench import gallery, peers
from benchmarks.bench.cli import app
from benchmarks.bench.commands import Selection
from benchmarks.bench.examine import Asked, run_quality
from benchmarks.bench.quality import METRICS
from benchmarks.bench.weights import Places, source_of
from hypersd_export.bundle.cache import StageCache
from hypersd_export.export import Exported
from hypersd_export.verify.source import SourceRequest, open_source
from tests.bench.clips import tiny_clip
from tests.train.test_distill_ddp import _on_two as on_two


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_latency_of_a_bundle_and_of_torch(exported: Exported, tiny_base: Path, tmp_path: Path) -> None:
    options = ["--rounds", "2", "--sessions", "1", "--warmup", "0", "--threads", "1", "--base", str(tiny_base)]
    arguments = ["latency", str(exported.path), "--vs", "torch", *options, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "out" / "latency.json").read_text()) == report
    bundle, torch = report["entrants"]
    assert (bundle["name"], torch["name"], report["reference"]) == ("tiny", "torch", "tiny")
    assert bundle["digest"] == exported.digest
    for row in (bundle, torch):
        assert row["status"] == "measured", row
        assert set(row["components_ms"]) == {"text_encoder", "unet", "vae_decoder"}
        assert row["image_ms"]["count"] == 2
        assert 20 < row["peak_mb"] < 2000
        assert row["roofline"]["of_gemm"] > 0
    assert torch["picture_psnr_db"] > 50
    assert torch["ratio"]["value"] > 0
    assert report["peak"]["gemm_gflop_per_s"] > 1
    assert str(tmp_path) not in json.dumps(report)


def test_a_fused_pipeline_is_what_diffusers_reads(lora_exported: Exported, tiny_base: Path, lora_file: Path,
                                                  tmp_path: Path) -> None:  # fmt: skip
    import torch
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    places = Places(base=str(tiny_base), loras=(str(lora_file),))
    source = source_of(lora_exported.path, places)
    assert source.loras[0][1] == 0.8
    stage = peers.fused_pipeline(source, StageCache(tmp_path / "stages"))
    pipeline = StableDiffusionPipeline.from_pretrained(stage.path)
    names = load_file(stage.path / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)  # as transformers 4 has them
    for name in ("unet", "text_encoder", "vae"):
        mine = getattr(pipeline, name).state_dict()
        fused = source.load(name, torch.float32)[0].state_dict()
        assert all(torch.equal(mine[key], value) for key, value in fused.items())
    plain = open_source(SourceRequest(base=str(tiny_base))).load("unet", torch.float32)[0].state_dict()
    assert any(not torch.equal(pipeline.unet.state_dict()[key], value) for key, value in plain.items())
    golden = json.loads((lora_exported.path / "golden" / "golden.json").read_text())
    ids = pipeline.tokenizer(golden["prompt"], padding="max_length").input_ids
    assert ids == np.load(lora_exported.path / "golden" / "prompt_ids.npy").ravel().tolist()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "few.tsv"
    lines = [f"cat {i}\t{'even' if i % 2 == 0 else 'odd'}" for i in range(6)]
    file.write_text("Prompt\tCategory\n" + "\n".join(lines) + "\n")
    return file


def test_quality_of_a_bundle_and_its_teacher(
    exported: Exported, tiny_base: Path, clip: Path, prompts: Path, tmp_path: Path
) -> None:
    options = ["--prompts", str(prompts), "--clip", str(clip), "--base", str(tiny_base), "--teacher-steps", "2"]
    more = ["--vs", "teacher", "--shown", "2", "--count", "5", "--out", str(tmp_path / "out")]
    arguments = ["quality", str(exported.path), *options, *more]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "out" / "quality.json").read_text()) == report
    assert report["prompts"]["count"] == 5
    assert report["eye"]["name"] == "tiny-clip"
    assert report["reference"] == {"name": "teacher at 2 steps"}
    bundle, teacher = report["candidates"]
    assert set(bundle["figures"]) == {name for name in METRICS if not name.startswith("reward")}
    assert bundle["figures"]["psnr_db"]["value"] > 50
    assert set(bundle["categories"]) == {"even", "odd"}
    assert teacher["guidance"] == 7.5
    assert "apart" in teacher["differences"]["clip_score"]
    assert "psnr_db" not in teacher["figures"]
    assert report["shown"]["files"] == {
        "tiny": ["pictures/00-00.png", "pictures/00-01.png"], "teacher": ["pictures/01-00.png", "pictures/01-01.png"],
    }  # fmt: skip
    for name in report["shown"]["files"]["tiny"]:
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.size == (16, 16)
    assert str(tmp_path) not in json.dumps(report)
    again = CliRunner().invoke(app, arguments)
    assert json.loads(again.stdout.splitlines()[-1])["candidates"] == report["candidates"]


def quality_rows(bundle: str, base: str, clip: str, prompts: str, cache: str) -> Any:
    """The rows of a quality report, None in a process that only helped; for processes that are forked."""
    selection = Selection(bundles=(Path(bundle),), places=Places(base=base), cache_dir=Path(cache))
    asked = Asked(prompts=Path(prompts), clip=clip, reference="none", psnr=False)
    report = run_quality(selection, asked, out=None, command=[])
    return None if report is None else [report["processes"], report["candidates"]]


def test_two_processes_have_the_figures_of_one(
    exported: Exported, tiny_base: Path, clip: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate with gloo; each process draws its own chunks of two prompts."""
    monkeypatch.setattr(gallery, "CHUNK", 2)
    given = [str(path) for path in (exported.path, tiny_base, clip, prompts)]
    alone, rows = quality_rows(*given, str(tmp_path / "one"))
    first, second = on_two(tmp_path / "results", quality_rows, *given, str(tmp_path / "two"))
    assert second is None
    assert (alone, first[0]) == (1, 2)
    assert first[1] == rows


def test_errors_are_one_line(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    for arguments, message in (
        (["latency", str(tmp_path / "none")], "error: no bundle at"),
        (["latency", str(exported.path), "--rounds", "0"], "error: --rounds 0 --sessions 5: at least one round"),
        (["latency", str(exported.path), "--vs", "x"], "error: --vs x: choose from torch"),
        (["latency", str(exported.path), "--vs", "torch", "--vs", "torch"], "error: --vs torch --vs torch: name each"),
        (["latency", str(exported.path), "--batch", "a"], "error: --batch"),
        (["quality", str(exported.path)], "error: --prompts: tiny is not of the built-in model; name a file"),
        (["quality", str(exported.path), "--prompts", str(tmp_path / "empty.txt")], "empty.txt: has no prompt"),
        (["quality", str(exported.path), "--prompts", str(tmp_path / "p.txt"), "--vs", "compile"], "choose torch or"),
        (
            ["quality", str(exported.path), "--prompts", str(tmp_path / "p.txt"), "--reference", "none"],
            "the judge sees 32 x 32 px",
        ),
        (["quality", str(exported.path), "--prompts", str(tmp_path / "p.txt"), "--clip", str(tmp_path)], "is missing"),
        (["latency", str(exported.path), "--out", str(tmp_path / "p.txt")], "p.txt: is a file; name a folder"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1, arguments
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_a_changed_bundle_is_one_line(exported: Exported, tmp_path: Path) -> None:
    copy = shutil.copytree(exported.path, tmp_path / "copy")
    (copy / "plan.json").write_text("{}")
    result = CliRunner().invoke(app, ["latency", str(copy)])
    assert result.exit_code == 1
    assert "is not what was exported: plan.json was changed; export it again" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
