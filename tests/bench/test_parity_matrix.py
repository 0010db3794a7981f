"""The parity matrix: which cells there are, what one says, and that a refusal is a failure."""

import json

import pytest
import torch

from benchmarks import parity_matrix
from benchmarks.parity_matrix import EMBEDDED, FORMS, PLANS, Form, cell, main, page, specs
from benchmarks.random_pipeline import FAMILIES, SCHEDULE, write, write_lora
from hypersd_export.errors import ParityError
from hypersd_export.model.base import open_base
from hypersd_export.model.families import Family
from hypersd_export.verify.source import SourceRequest, open_source


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_pipelines_are_of_their_family(family, tmp_path):
    base = open_base(write(family, tmp_path / family, tiny=True))
    base.require_exportable()
    assert base.family is {"sd21": Family.sd21, "sdxl": Family.sdxl}.get(family, Family.sd15)
    assert base.scheduler_config["prediction_type"] == (
        "v_prediction" if family == "sd21" else SCHEDULE["prediction_type"]
    )
    assert (base.unet_config.get("time_cond_proj_dim") is not None) == (family == "lcm")
    last = list(base.tokenizers.values())[-1]
    assert last.pad == ("!" if family in ("sd21", "sdxl") else "<|endoftext|>")


def test_a_random_lora_is_of_the_recipe_s_size_and_fits(tmp_path):
    folder = write("sd15", tmp_path / "sd15", tiny=True)
    source = open_source(SourceRequest(base=str(folder), loras=((str(write_lora(folder, tmp_path / "l.st")), 1.0),)))
    source.check_loras()
    lora, _ = source.loras[0]
    assert lora.ranks == (64,)
    assert {name.rpartition("attn1_")[2] for name in lora.components["unet"] if "attn1_" in name} == {
        "to_q", "to_k", "to_v", "to_out_0"
    }  # fmt: skip
    _, (report,) = source.load("unet", torch.float16)
    assert report["modules"] == len(lora.components["unet"]) > 40
    assert 0.005 < report["relative_norm"] < 0.2
    assert report["zero_modules"] == 0


def test_every_family_has_every_plan_and_form(tmp_path):
    found = [
        (family, plan, form.name) for family, plan, form, _ in specs({"sd15": "x", "lcm": "y"}, tmp_path, tmp_path)
    ]
    assert len(found) == len(set(found)) == len(FORMS) * (len(PLANS) + len(EMBEDDED))
    assert {plan for family, plan, _ in found if family == "lcm"} == set(EMBEDDED)


class Done:
    """What an export returns, as far as a cell looks."""

    def __init__(self, parity):
        self.manifest = type("Manifest", (), {"parity": parity})()


def test_a_cell_is_the_worst_component_and_the_picture(monkeypatch):
    figures = {"unet": 57.0, "vae_decoder": 133.0, "image": 41.0, "unet fp32": 20.0}
    parity = {name: {"psnr_db": db} for name, db in figures.items()}
    monkeypatch.setattr("hypersd_export.export.export", lambda spec: Done(parity))
    assert cell(None) == {"worst": "unet", "worst_db": 57.0, "image_db": 41.0}

    def refused(spec):
        raise ParityError("not the same as torch")

    monkeypatch.setattr("hypersd_export.export.export", refused)
    assert cell(None) == {"error": "not the same as torch"}


def test_the_command_ends_with_the_refusals(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(parity_matrix, "FORMS", (Form(name="fp32"), Form(name="int8")))
    count = 2 * len(PLANS)
    answers = iter([{"worst": "unet", "worst_db": 120.0, "image_db": 200.0}] * (count - 1) + [{"error": "no"}])
    monkeypatch.setattr(parity_matrix, "cell", lambda spec: next(answers))
    assert main(["--out", str(tmp_path), "--only", "builtin"]) == 1
    data = json.loads((tmp_path / "parity.json").read_text())
    assert (len(data["rows"]), data["rows"][-1]["error"]) == (count, "no")
    text = (tmp_path / "parity.md").read_text()
    assert "| builtin: ddim, 2 steps | 120, equal | 120, equal |" in text
    assert "| builtin: lcm, 4 steps | 120, equal | REFUSED |" in text
    assert f"{count} exports, 1 refused" in text
    assert "lcm, 4 steps: int8: no" in capsys.readouterr().out


def test_the_page_leaves_a_gap_where_nothing_was_exported():
    rows = [{"family": "a", "plan": "p", "form": "fp32", "worst": "unet", "worst_db": 99.4, "image_db": 60.2}]
    assert "| a: p | 99, 60 |  |  |  |  |" in page(rows, {"torch": "2"}, "x")
