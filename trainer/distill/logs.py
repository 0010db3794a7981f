"""What a distillation writes down: log.jsonl always, TensorBoard or Weights & Biases beside it.

log.jsonl has one line per step, {"stage", "step", "lr", "seconds", and every loss by name}, and lines with
"validation": true. A resumed run drops the lines from the step on where it goes on, so that the file reads as one run.
"""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypersd_export.errors import DataError, DestinationError, MissingBackend, OptionError
from trainer.distill.snapshot import Place, refusal, writing

if TYPE_CHECKING:
    from PIL.Image import Image

TRACKERS = ("tensorboard", "wandb")
NONE = ("", "none")
LOG = "log.jsonl"


def check_log_with(name: str) -> None:
    """OptionError for a tracker that is not known, MissingBackend for one that is not installed."""
    if name not in (*TRACKERS, *NONE):
        raise OptionError(f"log_with {name!r}: must be one of {', '.join(TRACKERS)}, none; log.jsonl is always written")
    if name in TRACKERS and importlib.util.find_spec(name) is None:
        extra = "train" if name == "tensorboard" else name
        raise MissingBackend(name, extra, f"log_with {name} (or take --set log_with=none, log.jsonl is always written)")


class JsonLog:
    """`out`/log.jsonl, cut back to `begin`: construct, `write` line by line, `close`."""

    def __init__(self, out: Path, begin: Place) -> None:
        self.path = out / LOG
        kept = [line for line in self._lines() if _place(line) < begin]
        with writing(self.path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, place: Place, values: Mapping[str, Any]) -> None:
        """One line; DestinationError if the disk refuses it."""
        try:
            self._file.write(json.dumps({"stage": place.stage, "step": place.step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise DestinationError(refusal(self.path, error)) from error

    def close(self) -> None:
        """No more lines."""
        self._file.close()

    def _lines(self) -> list[str]:
        """The whole lines there are; a last one that a kill cut off is dropped."""
        if not self.path.exists():
            return []
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            if lines and not lines[-1].endswith("\n"):
                lines.pop()
            for line in lines:
                _place(line)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path}: not a log of a distillation ({error}); move it away") from error
        return lines


def read_log(out: Path) -> list[dict[str, Any]]:
    """The lines of `out`/log.jsonl."""
    return [json.loads(line) for line in (out / LOG).read_text(encoding="utf-8").splitlines()]


def start_tracker(name: str, out: Path, *, first_step: int, config: Mapping[str, Any]) -> Any:
    """accelerate's tracker, started, or None; events from `first_step` (over all stages) on are dropped."""
    if name == "tensorboard":
        from accelerate.tracking import TensorBoardTracker

        tracker = TensorBoardTracker("tensorboard", out, purge_step=first_step)
    elif name == "wandb":
        from accelerate.tracking import WandBTracker

        tracker = WandBTracker("hypersd-distill", dir=str(out), config=dict(config))
    else:
        return None
    tracker.start()
    return tracker


def log_grid(tracker: Any, grid: "Image", step: int) -> None:
    """A validation's pictures to the tracker."""
    if tracker.name == "tensorboard":
        import numpy as np

        tracker.log_images({"validation": np.asarray(grid)[None]}, step=step, dataformats="NHWC")
    else:
        tracker.log_images({"validation": [grid]}, step=step)


def _place(line: str) -> Place:
    data = json.loads(line)
    return Place(int(data["stage"]), int(data["step"]))
