"""A package on disk: written by coremltools, then made the same byte for byte wherever and whenever it is written.

NAME.mlpackage/Manifest.json
NAME.mlpackage/Data/com.apple.CoreML/model.mlmodel           the program, a protobuf
NAME.mlpackage/Data/com.apple.CoreML/weights/weight.bin      its weights
"""

import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypersd_export.targets.coreml import vendor

AUTHOR = "com.apple.CoreML"
MODEL_FILE = f"Data/{AUTHOR}/model.mlmodel"
WEIGHTS_FILE = f"Data/{AUTHOR}/weights/weight.bin"
_DATED = "com.github.apple.coremltools.conversion_date"
_NOTES = "executorch_debug_handle_mapping.json"
"""What coremltools writes beside the package's own files, of no use to Core ML."""


def save(model: Any, path: Path) -> None:
    """Write a coremltools model as the package `path`, without what differs from one run to the next."""
    model.save(str(path))
    tidy(path)


def tidy(path: Path) -> None:
    """Take out of a package that coremltools wrote what differs from one run to the next."""
    (path / _NOTES).unlink(missing_ok=True)
    write(path, vendor.read_model(path / MODEL_FILE))


def write(path: Path, model: Any) -> None:
    """Write the program `model` (a protobuf) and the manifest of a package whose weights are there, if it has any.

    The date goes; maps are written in the order of their keys, and the manifest's identifiers follow from the names.
    """
    model.description.metadata.userDefined.pop(_DATED, None)
    (path / MODEL_FILE).write_bytes(model.SerializeToString(deterministic=True))
    items = [("model.mlmodel", "CoreML Model Specification", f"{AUTHOR}/model.mlmodel")]
    if (path / WEIGHTS_FILE).is_file():
        items.append(("weights", "CoreML Model Weights", f"{AUTHOR}/weights"))
    entries = {
        str(uuid.uuid5(uuid.NAMESPACE_URL, where)): {
            "author": AUTHOR, "description": about, "name": name, "path": where,
        }
        for name, about, where in items
    }  # fmt: skip
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": next(iter(entries)),
    }
    text = json.dumps(manifest, indent=4, sort_keys=True)  # as coremltools itself writes it
    (path / "Manifest.json").write_text(text + "\n", encoding="utf-8")


@contextmanager
def loaded(path: Path, scratch: Path) -> Iterator[Any]:
    """A package as a coremltools model, out of a stand-in in the folder `scratch`."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        yield vendor.load(stand_in(path, Path(folder) / path.name))


def stand_in(path: Path, beside: Path) -> Path:
    """A package of the files of `path`, as `beside`, for coremltools: loading one writes its manifest again, and a
    stage of the cache must stay as it is."""
    beside.mkdir()
    shutil.copyfile(path / "Manifest.json", beside / "Manifest.json")
    (beside / "Data").symlink_to((path / "Data").resolve(), target_is_directory=True)
    return beside


def main_block(model: Any) -> Any:
    """The ops of the program's main function, or of the default one where there are several; a protobuf block."""
    function = model.mlProgram.functions[model.description.defaultFunctionName or "main"]
    return function.block_specializations[function.opset]


def facts(path: Path) -> dict[str, Any]:
    """What the manifest says about a package: ops (constants apart), bytes in all, and bytes of weights."""
    ops = main_block(vendor.read_model(path / MODEL_FILE)).operations
    weights = path / WEIGHTS_FILE
    return {
        "ops": sum(1 for op in ops if op.type != "const" and not op.type.startswith("constexpr_")),
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "weight_bytes": weights.stat().st_size if weights.is_file() else 0,
    }
