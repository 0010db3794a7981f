"""Our bundle in optimum-onnx's pipeline. Needs `make peer-optimum` (another environment), so it is marked slow."""

import json
import subprocess
from pathlib import Path

import pytest

from hypersd_export.export import Exported

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-peers" / "optimum" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="make peer-optimum sets up the environment of optimum-onnx")
def test_optimum_draws_the_same_picture_and_io_binding_ruins_it(exported: Exported):
    command = [str(PYTHON), str(ROOT / "benchmarks" / "peers" / "optimum" / "check.py"), str(exported.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["guidance"] is None
    assert result["psnr_db"] > 40
    assert result["psnr_db_io_binding"] < 30  # the UNet's output was written over the latents


def test_the_card_names_the_setting(exported: Exported):
    card = (exported.path / "README.md").read_text(encoding="utf-8")
    assert "ORTStableDiffusionPipeline" in card
    assert "use_io_binding=False" in card
