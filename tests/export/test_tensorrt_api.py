"""The lists of what the builder uses of the vendor's libraries: complete, and true of the installed packages."""

import ast
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.peers.tensorrt_classic.check import names, probe
from benchmarks.peers.tensorrt_classic.probe import missing
from hypersd_export.targets import tensorrt_vendor
from hypersd_export.targets.tensorrt_checks import MOVING
from hypersd_export.targets.tensorrt_vendor import CLASSIC_NAMES, NAMES, RTX_NAMES

TARGETS = Path(tensorrt_vendor.__file__).parent
FILES = [TARGETS / f"tensorrt_{name}.py" for name in ("vendor", "checks", "worker")]
OBJECTS = {
    "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig",
    "ranges": "IOptimizationProfile", "layer": "ILayer", "trt": "", "loaded": "ICudaEngine", "refitter": "Refitter",
    "reader": "OnnxParserRefitter", "form": "ISerializationConfig",
}  # fmt: skip
"""What the sources call an object of each class."""


def used():
    """(class, name) of every attribute that the sources take of the library or of an object of it."""
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            chain = ast.unparse(node.value).removeprefix("self.").removeprefix("vendor.")
            if chain in OBJECTS:
                found.add((OBJECTS[chain], node.attr))
            elif chain.startswith("trt.") and chain.count(".") == 1:
                found.add((chain[4:], node.attr))
    return found


def listed():
    return {(owner, name) for names in (NAMES, RTX_NAMES, CLASSIC_NAMES) for owner, n in names.items() for name in n}


def test_all_that_is_used_is_listed():
    own = {("", "__version__"), ("ILogger", "__init__"), ("IProgressMonitor", "__init__")}
    ours = {("ILayer", name) for name in ("kind", "node", "inputs", "outputs", "dtypes", "size")}  # of checks.Layer
    assert used() - listed() - own - ours == set()


def test_all_that_is_listed_is_used():
    text = "\n".join(path.read_text() for path in FILES)
    composed = {("ComputeCapability", name) for name in RTX_NAMES["ComputeCapability"]}  # f"SM{…}"
    assert [name for _, name in sorted(listed() - composed) if text.count(name) < 2] == []
    assert set(NAMES["LayerType"]) == MOVING


@pytest.mark.skipif(not tensorrt_vendor.installed("rtx"), reason="tensorrt_rtx is not installed")
def test_the_rtx_library_has_them_all():
    module = tensorrt_vendor.module("rtx")
    assert missing(module, NAMES) == missing(module, RTX_NAMES) == missing(module, CLASSIC_NAMES) == []
    assert missing(module, {"Builder": ["invented"], "": ["Invented"], "Nothing": ["x"]}) == [
        "Builder.invented", "Invented", "Nothing.x",
    ]  # fmt: skip


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_bindings") is None, reason="classic's bindings are not installed"
)
@pytest.mark.skipif(not all(map(shutil.which, ("gcc", "nm", "readelf"))), reason="no gcc or binutils")
def test_the_classic_bindings_have_what_is_used_of_them(tmp_path):
    assert probe(sys.executable, tmp_path, names())["missing"] == []
