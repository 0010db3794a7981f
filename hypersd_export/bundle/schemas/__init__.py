"""JSON Schemas (draft 2020-12) of the JSON files in a bundle, for readers in other languages.

manifest.json and golden.json are here; plan.json's schema lies with its writer, in `hypersd_export.diffusion`.
"""

import json
from pathlib import Path
from typing import Any

NAMES = ("plan", "manifest", "golden")


def load(name: str) -> dict[str, Any]:
    """The schema of plan.json, manifest.json or golden/golden.json; KeyError for any other name."""
    if name not in NAMES:
        raise KeyError(name)
    if name == "plan":
        from hypersd_export.diffusion.planfile import plan_schema

        return plan_schema()
    text = (Path(__file__).parent / f"{name}.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema
