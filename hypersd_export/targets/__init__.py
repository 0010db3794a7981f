"""What a pipeline can be exported to: one module a target, one verb `build`, vendor imports inside.

This module imports nothing heavy: it names the targets.
"""

from collections.abc import Mapping
from enum import StrEnum

from hypersd_export.errors import OptionError


class Target(StrEnum):
    """The targets by their name on the command line."""

    ONNX = "onnx"
    TENSORRT = "tensorrt"
    COREML = "coreml"


PRECISIONS: Mapping[Target, tuple[str, ...]] = {
    Target.ONNX: ("fp32", "fp16"),
    Target.TENSORRT: ("fp16",),
    Target.COREML: ("fp16", "fp32"),
}
"""What the weights and the arithmetic of each target can be; the first is its default."""


def precision_of(target: Target, asked: str | None) -> str:
    """The precision of a target when `--precision` says `asked` (None: nothing, which gives the target's default).

    Raises `OptionError` for one that the target does not have.
    """
    known = PRECISIONS[target]
    if asked is not None and asked not in known:
        raise OptionError(f"--precision {asked}: {target} is written in {' or '.join(known)} only as yet")
    return asked or known[0]


def resolve_targets(names: tuple[str, ...]) -> tuple[Target, ...]:
    """Targets from the command line's names, in the order given and without repetition; `all` means every one.

    Raises `OptionError` for an unknown name.
    """
    targets: list[Target] = []
    for name in names:
        if name == "all":
            targets += list(Target)
        elif name in list(Target):
            targets.append(Target(name))
        else:
            raise OptionError(f"--target {name}: unknown, choose from {', '.join(Target)} and all")
    return tuple(dict.fromkeys(targets))
