"""The import rule of docs/design.md, and that import is free: both read off the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(p for name in ("hypersd_export", "trainer", "benchmarks") for p in (ROOT / name).rglob("*.py"))

BELOW = {
    "errors": set(),
    "builtin": {"errors"},
    "usage": {"errors"},
    "worker": {"errors"},
    "diffusion": {"errors"},
    "model": {"errors", "diffusion", "builtin"},
    "graphs": {"errors", "diffusion", "model"},
    "bundle": {"errors", "diffusion"},
    "targets": {"errors", "worker", "diffusion", "model", "graphs", "bundle"},
    "runtime": {"errors", "diffusion", "bundle"},
    "verify": {"errors", "worker", "diffusion", "builtin", "model", "graphs", "bundle", "targets", "runtime"},
}
"""What each package of hypersd_export may import of the others; what is not named here (export, cli …) is on top."""
TRAINER_MAY = {"errors", "diffusion", "model"}
TORCH_FREE = ("hypersd_export/diffusion", "hypersd_export/bundle", "hypersd_export/runtime", "hypersd_export/errors.py")
HEAVY = {"torch", "diffusers", "transformers", "onnx", "onnxruntime", "peft", "accelerate", "tensorrt", "coremltools"}


def _imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names that a module imports; those under `if TYPE_CHECKING:` do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _parts_of_export(names: set[str]) -> set[str]:
    return {n.split(".")[1] for n in names if n.startswith("hypersd_export.") and n != "hypersd_export.__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_go_down(path):
    package, part = path.relative_to(ROOT).parts[0], path.relative_to(ROOT).parts[1].removesuffix(".py")
    names = _imports(path)
    if package == "hypersd_export":
        assert not [n for n in names if n.split(".")[0] in ("trainer", "benchmarks")]
        if part in BELOW:
            assert _parts_of_export(names) <= BELOW[part] | {part}
    if package == "trainer":
        assert _parts_of_export(names) <= TRAINER_MAY
        assert not [n for n in names if n.startswith("benchmarks")]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_torch_free_packages_never_name_torch(path):
    if str(path.relative_to(ROOT)).startswith(TORCH_FREE):
        assert not {n.split(".")[0] for n in _imports(path)} & {"torch", "diffusers", "transformers", "peft"}


def test_no_target_imports_another_but_tensorrt_may_use_onnx():
    targets = ROOT / "hypersd_export" / "targets"
    for path in targets.rglob("*.py"):
        others = {n.split(".")[2] for n in _imports(path) if n.startswith("hypersd_export.targets.")}
        family = path.relative_to(targets).parts[0].removesuffix(".py").partition("_")[0]  # a target of several files
        allowed = {"onnx"} if path.stem == "tensorrt" or family == "onnx" else set()
        if path != targets / "__init__.py":
            assert {name for name in others - allowed if name.partition("_")[0] != family} == set(), path


@pytest.mark.parametrize(
    "module",
    [
        "hypersd_export.cli",
        "hypersd_export.runtime.cli",
        "trainer.cli",
        "benchmarks.bench.cli",
        "hypersd_export",
        "trainer",
        "benchmarks",
    ],
)
def test_import_is_free(module):
    """Importing a command line brings in none of the heavy packages (so `--help` is quick and works without them)."""
    code = f"import sys, {module}; print(','.join(sorted({HEAVY!r} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def test_modules_are_of_a_readable_size():
    sizes = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in MODULES}
    assert {name: lines for name, lines in sizes.items() if lines > 400} == {}
