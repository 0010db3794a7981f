"""The project's own files: extras, constraints, Makefile, README."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))


def _name(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement)[0]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_core_dependencies_have_no_torch():
    assert {_name(r) for r in PROJECT["dependencies"]} == {"numpy", "pillow", "tokenizers", "typer", "rich"}


def test_extras_of_the_contract_exist_and_build_on_export():
    extras = PROJECT["optional-dependencies"]
    assert set(extras) >= {"cpu", "gpu", "export", "coreml", "tensorrt", "tensorrt-classic", "train", "bench", "dev"}
    for name in ("coreml", "tensorrt", "tensorrt-classic", "train", "bench", "dev"):
        assert "hypersd[export]" in extras[name]


def test_torch_is_pinned_without_a_local_suffix_and_installed_first():
    assert re.fullmatch(r"\d+\.\d+\.\d+", PINS["torch"])
    makefile = (ROOT / "Makefile").read_text()
    assert "-c constraints.txt" in makefile
    for target in (".demo", ".dev"):
        assert re.search(rf"^\$\(VENV\)/{re.escape(target)}: \$\(VENV\)/\.torch", makefile, re.M)


def test_every_requirement_of_dev_is_pinned_so_that_no_extra_upgrades_torch():
    extras = PROJECT["optional-dependencies"]
    names = {_canonical(_name(r)) for part in ("export", "cpu", "train", "dev") for r in extras[part]} - {"hypersd"}
    names |= {_canonical(_name(r)) for r in PROJECT["dependencies"]}
    assert names - {_canonical(p) for p in PINS} == set()


def test_the_installed_torch_is_the_pinned_one():
    from importlib.metadata import version

    assert version("torch").split("+")[0] == PINS["torch"]


def test_readme_shows_the_two_commands_and_they_exist():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for command in ("make demo", "make test"):
        assert command in readme
        assert re.search(rf"^{command.split()[1]}:", makefile, re.M)
    assert readme.index("make demo") < readme.index("![")  # the command first, the picture second


def test_console_scripts_point_at_functions():
    import importlib

    for target in PROJECT["scripts"].values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_package_data_ships():
    package = ROOT / "hypersd_export"
    assert (ROOT / "trainer" / "pretrain" / "drawings.webp").stat().st_size < 4_000_000
    assert (package / "builtin" / "ATTRIBUTION.md").exists()
