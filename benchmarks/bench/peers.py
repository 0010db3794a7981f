"""Other projects' pipelines of the same weights, each in an environment of its own under .venv-peers/.

A peer is given the bundle's weights as a diffusers folder with the LoRAs fused, and converts it with its own exporter,
as its users do; both are stages of the export's cache. `benchmarks/peers/NAME/painter.py` does the rest.
"""

import json
import os
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.results import last_line
from hypersd_export.bundle.cache import Stage, StageCache
from hypersd_export.bundle.digest import sha256_file
from hypersd_export.errors import HypersdError
from hypersd_export.verify.source import Source

ROOT = Path(__file__).parents[2]
PEERS = {"optimum": "make peer-optimum", "openvino": "make peer-openvino"}
"""What is measured against, and the command that sets it up."""
CONVERT_S = 3600.0


def python_of(name: str) -> Path | None:
    """The interpreter of a peer's environment; None if that was not set up."""
    python = ROOT / ".venv-peers" / name / "bin" / "python"
    return python if python.exists() else None


def painter_of(name: str) -> Path:
    """The peer's script."""
    return ROOT / "benchmarks" / "peers" / name / "painter.py"


def fused_pipeline(source: Source, cache: StageCache) -> Stage:
    """The base with its LoRAs fused as a diffusers folder, float32, that every version of diffusers reads."""

    def build(folder: Path) -> None:
        import torch

        for name in ("unet", "vae", "text_encoder"):
            module: Any = source.load(name, torch.float32)[0]
            if name == "text_encoder":
                _save_text_encoder(module, folder / name)
            else:
                module.save_pretrained(folder / name)
        source.base.write_tokenizer(folder / "tokenizer")
        (folder / "scheduler").mkdir()
        config = {"_class_name": "DDIMScheduler", **source.base.scheduler_config}
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config), encoding="utf-8")
        index = {**source.base.model_index(), "scheduler": ["diffusers", config["_class_name"]]}
        index["_diffusers_version"] = version("diffusers")  # by which optimum tells whose folder it is
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")

    return cache.get("bench-pipeline", {"source": source.digests, "code": sha256_file(Path(__file__))}, build)


def _save_text_encoder(module: Any, folder: Path) -> None:
    """transformers 5 has dropped a level of the names, which transformers 4 wants; 5 reads both."""
    from safetensors.torch import save_file

    folder.mkdir()
    module.config.save_pretrained(folder)
    prefix = "text_model."
    weights = {prefix + name.removeprefix(prefix): value.contiguous() for name, value in module.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def converted(name: str, fused: Stage, cache: StageCache, *, tell: Callable[[str], None]) -> Stage:
    """What the peer's own exporter makes of the pipeline; `HypersdError` in one line if it fails."""
    python, script = python_of(name), painter_of(name)
    requirements = script.with_name("requirements.txt")
    depends = {"pipeline": fused.key, "script": sha256_file(script), "requirements": sha256_file(requirements)}

    def build(folder: Path) -> None:
        tell(f"{name} converts the pipeline")
        command = [str(python), str(script), "convert", str(fused.path), str(folder)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False, timeout=CONVERT_S,
                env=peer_environment(),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise HypersdError(f"{name}: its conversion took more than {CONVERT_S:g} s") from None
        if done.returncode != 0:
            raise HypersdError(f"{name}: its conversion failed: {last_line(done.stderr)[:300]}")

    return cache.get(f"bench-{name}", depends, build)


def peer_environment() -> dict[str, str]:
    """Our own standard-library modules are on the path of a peer, and nothing of our environment is."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONNOUSERSITE": "1"}
