"""Import classic TensorRT's Python bindings without its libraries, and say which of some names they lack.

`python probe.py WORK < names.json`: names by class ("" is the module itself). Runs in an environment that has
`tensorrt-cu12-bindings` or `tensorrt-cu13-bindings` and nothing else; imports nothing of this project. The libraries
that the bindings are linked to are built here, by gcc, in the folder WORK: each symbol is a function that returns 0, so
that classes and enums can be looked at and nothing can be run. What the package adds in Python counts as there. Prints
one JSON line: {"version": …, "missing": [names]}.
"""

import ast
import ctypes
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def linked(library: Path) -> tuple[list[str], list[str]]:
    """(NVIDIA's libraries, undefined C symbols that are theirs) of the bindings' shared library, by readelf and nm."""
    dynamic = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    found = [line.split("[")[1].split("]")[0] for line in dynamic.splitlines() if "(NEEDED)" in line]
    table = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1].split("@")[0] for line in table.stdout.splitlines()]
    theirs = ("createInfer", "createNv", "getBuilder", "getNv", "getPlugin", "initLibNv", "getLogger", "getInfer")
    return [name for name in found if name.startswith("libnv")], [s for s in symbols if s.startswith(theirs)]


def load_stubs(library: Path, work: Path) -> None:
    """Build and load libraries of the names that `library` is linked to; each has every symbol."""
    names, symbols = linked(library)
    source = work / "stub.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols))
    for name in names:
        command = ["gcc", "-shared", "-fPIC", "-o", str(work / name), f"-Wl,-soname,{name}", str(source)]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(work / name), mode=ctypes.RTLD_GLOBAL)


def bindings() -> Any:
    """The module `tensorrt` of the package `tensorrt_bindings`, by its file: the package itself wants the libraries."""
    package = importlib.util.find_spec("tensorrt_bindings")
    if package is None or package.origin is None:
        raise SystemExit("tensorrt_bindings is not installed: pip install tensorrt-cu12-bindings")
    library = next(Path(package.origin).parent.glob("tensorrt*.so"))
    load_stubs(library, Path(sys.argv[1]))
    spec = importlib.util.spec_from_file_location("tensorrt", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for node in ast.parse(Path(package.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            vars(module).setdefault(node.name, None)
    return module


def missing(module: Any, names: dict[str, list[str]]) -> list[str]:
    """Those that the module or its classes lack, as Class.name."""
    lacking = []
    for owner, wanted in names.items():
        found = getattr(module, owner, None) if owner else module
        lacking += [f"{owner}.{name}".lstrip(".") for name in wanted if not hasattr(found, name)]
    return lacking


def main() -> None:
    """Read, look, print."""
    from importlib import metadata

    module = bindings()
    versions = [metadata.version(d.name) for d in metadata.distributions() if d.name.startswith("tensorrt")]
    print(json.dumps({"version": versions[0], "missing": missing(module, json.load(sys.stdin))}))


if __name__ == "__main__":
    main()
