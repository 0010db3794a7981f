"""The table of Core ML forms: commands, rows from manifests and quality.json, and the page."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import coreml_table
from benchmarks.coreml_table import FORMS, Form, main, markdown, rows
from hypersd_export.cli import app
from tests.bundles import seal


def figure(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 1, "high": value + 1, "count": 3}


def bundle(folder: Path, sizes: dict[str, int]) -> Path:
    folder.mkdir(parents=True)
    manifest: dict[str, Any] = {
        "format": "hypersd-bundle/1", "created": "", "hypersd": "0", "base": {}, "loras": [], "options": {},
        "versions": {}, "stages": [], "parity": {}, "files": {},
        "targets": {"coreml": {"components": {name: {"bytes": size} for name, size in sizes.items()}}},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_rows_and_page(tmp_path: Path) -> None:
    forms = Form(), Form(bits=4, grouped=True)
    assert [form.name for form in forms] == ["fp16-original", "fp16-original-4-grouped"]
    bundles = {form: bundle(tmp_path / form.name, {"unet": 4_000_000 // (1 + 3 * bool(form.bits)), "vae": 1_000_000})
               for form in forms}  # fmt: skip
    candidates = [
        {"name": forms[0].name, "figures": {"psnr_db": figure(62.2), "clip_score": figure(76.1)}},
        {"name": forms[1].name, "figures": {"psnr_db": figure(30.0), "clip_score": figure(75.0)},
         "differences": {"clip_score": figure(-1.1)}},
    ]  # fmt: skip
    found = rows(bundles, {"candidates": candidates})
    assert [(row["packages_mb"], row["unet_mb"]) for row in found] == [(5.0, 4.0), (2.0, 1.0)]
    lines = markdown(found, 4, 3).splitlines()
    assert lines[0] == "# Core ML packages of the built-in model, 4 steps"
    assert [form.name for form in (Form(integers="int8"), Form(budget=0.25, grouped=True))] == [
        "fp16-original-int8", "fp16-original-mixed-0.25-grouped",
    ]  # fmt: skip
    assert lines[-2] == "| fp16, original | – | 5.0 | 4.0 | 62.2 [61.2, 63.2] | 76.1 [75.1, 77.1] | – |"
    assert lines[-1] == (
        "| fp16, original | 4 grouped | 2.0 | 1.0 | 30.0 [29.0, 31.0] | 75.0 [74.0, 76.0] | -1.1 [-2.1, -0.1] |"
    )


def test_every_form_is_one_of_its_own_that_the_export_takes(tmp_path: Path) -> None:
    """Through the command line's own parser, up to a base that does not exist."""
    assert len({form.name for form in FORMS}) == len(FORMS) == 26
    for form in FORMS:
        command = [*form.command(tmp_path / "b", 4), "--base", str(tmp_path / "no-base")]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1
        assert "no-base" in result.output


def test_an_export_that_fails_ends_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Form, "command", lambda self, out, steps: ["--target", "nothing"])
    assert main(["--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --target nothing: unknown, choose from")
    assert error.count("\n") == 1


def test_whole_bundles_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was changed is exported again; what is asked of the pictures leaves their diversity out."""
    monkeypatch.setattr(coreml_table, "FORMS", (Form(), Form(bits=8), Form(bits=6)))
    for form in (Form(), Form(bits=8)):
        (tmp_path / "bundles" / form.name).mkdir(parents=True)
    seal(tmp_path / "bundles" / Form().name)
    changed = seal(tmp_path / "bundles" / Form(bits=8).name)
    (changed / "more").write_text("x")
    asked: list[list[str]] = []

    def run(command: list[str]) -> str:
        asked.append(command)
        (tmp_path / "quality.json").write_text(json.dumps({"candidates": [], "machine": {}}))
        return ""

    monkeypatch.setattr(coreml_table, "run_module", run)
    monkeypatch.setattr(coreml_table, "rows", lambda bundles, quality: [])
    monkeypatch.setattr(coreml_table, "markdown", lambda *arguments: "")
    assert main(["--out", str(tmp_path), "--count", "5"]) == 0
    exported = [command[command.index("--out") + 1] for command in asked[:-1]]
    assert [Path(out).name for out in exported] == [Form(bits=8).name, Form(bits=6).name]
    assert asked[-1][:2] == ["benchmarks.bench.cli", "quality"]
    assert asked[-1][asked[-1].index("--varied") + 1] == "0"
