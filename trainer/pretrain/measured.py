"""What the built-in model's small trainings share: a run in a folder that ends in a record of held-out figures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypersd_export.errors import DataError
from hypersd_export.model.files import read_json
from trainer.base import TrainingBase, open_training_base
from trainer.config import as_json
from trainer.distill.snapshot import writing
from trainer.pretrain.drawings import read_drawings
from trainer.pretrain.scenes import SceneRenderer


class Measured:
    """A training's configuration, base and folder. key: of the held-out figures in the record, which is JSON."""

    key: str

    def __init__(
        self, config: Any, out: Path, *, base: TrainingBase | None = None, say: Callable[[str], object] = bool
    ) -> None:
        self.config, self.out, self._say = config, out, say
        self._base = base or open_training_base(config.base)
        self._renderer = SceneRenderer(read_drawings(), self._base.native_size)
        self.figures: dict[str, float] = {}

    def _finished(self, record: Path) -> bool:
        """Whether the record is this configuration's; then its figures are taken over."""
        found = read_json(record, DataError) if record.exists() else {}
        if found.get("config") != as_json(self.config):
            return False
        self.figures = found[self.key]
        return True

    def _write_record(self, path: Path) -> None:
        record = {"config": as_json(self.config), "base": self._base.digest, self.key: self.figures}
        with writing(path) as partial:
            partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
