"""What a bundle says in JSON beside its graphs: the components' configurations and the plans."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypersd_export.bundle.texts import SECOND, Encoder, encoders_of
from hypersd_export.diffusion.planfile import PlanFile
from hypersd_export.errors import BundleError, HypersdError

FUNCTIONS = "functions"
"""The folder with plan.json and golden/ of each function, where a bundle has several."""


@dataclass(frozen=True, slots=True)
class Folder:
    """The folder of a bundle; everything is read when it is asked for."""

    path: Path
    function: str | None = None
    """Of a bundle whose packages have several: plan and golden files are those of this one, or of the default."""

    @property
    def own(self) -> Path:
        """Where plan.json and golden/ lie."""
        return self.path if self.function is None else self.path / FUNCTIONS / self.function

    def config(self, component: str) -> dict[str, Any]:
        """A component's config.json; BundleError if it cannot be read."""
        return read_object(self.path / component / "config.json")

    def encoders(self) -> tuple[Encoder, ...]:
        """The text encoders; BundleError if a configuration cannot be read."""
        names = [name for name in ("text_encoder", SECOND) if (self.path / name).is_dir()]
        return encoders_of({name: self.config(name) for name in names} if len(names) > 1 else {})

    def value(self, component: str, key: str) -> Any:
        """An entry of a component's config.json that has to be there; BundleError otherwise."""
        config = self.config(component)
        if config.get(key) is None:
            raise BundleError(f"{self.path}/{component}/config.json has no {key}: export the bundle again")
        return config[key]

    def plans(self) -> PlanFile:
        """plan.json; BundleError if it cannot be read or used."""
        path = self.own / "plan.json"
        data = read_object(path)
        try:
            return PlanFile.from_json(data)
        except HypersdError as error:
            raise BundleError(f"{path} cannot be used ({error}): export the bundle again") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; BundleError if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read {path} ({str(error)[:80]}): export the bundle again") from error
    if not isinstance(data, dict):
        raise BundleError(f"{path} holds no JSON object: export the bundle again")
    return data
