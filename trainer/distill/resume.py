"""From where a run goes on: which checkpoint, and whether its configuration allows it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypersd_export.errors import DataError, DestinationError, OptionError
from trainer.config import as_json, flat
from trainer.distill.config import DistillConfig
from trainer.distill.snapshot import FOLDER, Place, Snapshot, load_snapshot, newest, refusal, writing

RUN = "run.json"
PROBE = ".write-test-"
FREE = {
    "save_every", "keep", "validate_every", "validation_prompts", "log_with", "micro_batch", "gradient_checkpointing",
    "data.cache",
}  # fmt: skip
"""What may change from one start to the next, because the weights do not depend on it (beyond rounding)."""


def open_run(out: Path, config: DistillConfig, resume: str) -> Snapshot | None:
    """What to go on from, None for the beginning; checks `out` for writing and the configuration for changes.

    `resume`: latest (go on, or begin), never (refuse a folder with a run), or a checkpoint's path. OptionError for
    another run's folder and for a changed configuration, which names the keys; DataError for a damaged checkpoint;
    DestinationError if `out` cannot be written.
    """
    # another process of this run may be at its own write test, or have been killed in it
    present = {path.name for path in _listing(out) if not path.name.startswith(PROBE)}
    stored = RUN in present or (out / FOLDER).exists()
    if resume == "never" and stored:
        raise OptionError(f"--out {out} has a run already; take --resume latest to go on, or another folder")
    if present and not stored:
        raise OptionError(f"--out {out} has files but no run of this command in it; take another folder")
    _check_writable(out)
    if resume not in ("latest", "never"):
        snapshot: Snapshot | None = load_snapshot(_given(Path(resume)))
    else:
        snapshot = newest(out)
    if snapshot is not None:
        check_config(snapshot.extra.get("config", {}), config, snapshot.place, where="the checkpoint")
    elif (out / RUN).exists():
        check_config(_stored_config(out / RUN), config, Place(1, 0), where=f"{out / RUN}")
        if any(name.endswith("-lora.safetensors") for name in present):
            raise OptionError(f"--out {out} has finished LoRAs but no checkpoint to go on from; take another folder")
    return snapshot


def check_config(stored: Mapping[str, Any], config: DistillConfig, place: Place, *, where: str) -> None:
    """OptionError that names every key that has changed and must not; steps may grow from the present stage on."""
    before, now = flat(stored), flat(as_json(config))
    changed = []
    for key in sorted({*before, *now} - FREE):
        if before.get(key) == now.get(key):
            continue
        if _is_steps(key) and key in before and key in now:
            stage = int(key.split(".")[1]) + 1
            least = place.step if stage == place.stage else 0
            if stage > place.stage or (stage == place.stage and now[key] >= least):
                continue
        changed.append(f"{key} {_short(before.get(key))} -> {_short(now.get(key))}")
    if changed:
        raise OptionError(
            f"the configuration is not that of {where}, which is in stage {place.stage} at step {place.step}: "
            f"{'; '.join(changed)}; give it the same values, or another --out"
        )


def write_run(out: Path, config: DistillConfig, facts: Mapping[str, Any]) -> None:
    """`out`/run.json: the resolved configuration, and `facts` about base and versions."""
    with writing(out / RUN) as partial:
        partial.write_text(json.dumps({"config": as_json(config), **facts}, indent=1), encoding="utf-8")


def _listing(out: Path) -> list[Path]:
    try:
        return list(out.iterdir()) if out.exists() else []
    except OSError as error:
        raise DestinationError(f"--out {out}: {error.strerror}; take a folder that you can write to") from error


def _check_writable(out: Path) -> None:
    probe = out / f"{PROBE}{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise DestinationError(refusal(out, error)) from error


def _given(path: Path) -> Path:
    if not path.exists():
        raise OptionError(f"--resume {path}: neither latest, never, nor a checkpoint that exists")
    if not path.is_file():
        raise OptionError(f"--resume {path}: not a file; name one of its checkpoints/*.safetensors")
    return path


def _stored_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); take another --out") from error
    return config


def _is_steps(key: str) -> bool:
    return key.startswith("stages.") and key.endswith(".steps")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
