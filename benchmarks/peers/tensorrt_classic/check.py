"""Are all calls of the TensorRT builder and runtime in classic TensorRT's real bindings, in each of its major versions?

`python -m benchmarks.peers.tensorrt_classic.check` makes an environment for each version in WORK, installs the bindings
alone there (4 MB; the libraries come from NVIDIA's own index and need a GPU), and runs `probe.py` in it. Needs gcc and
binutils. What this cannot see: whether a call does what we think. Prints one JSON line a version; exit code 1 if a name
is missing.
"""

import argparse
import json
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hypersd_export.runtime import nvidia
from hypersd_export.targets import tensorrt_vendor

VERSIONS = ("tensorrt-cu12-bindings>=11,<12", "tensorrt-cu13-bindings>=11,<12", "tensorrt-cu12-bindings>=10,<11")
PROBE = Path(__file__).with_name("probe.py")


def names() -> dict[str, list[str]]:
    """All that builder and runtime use of classic TensorRT, by class."""
    merged: dict[str, set[str]] = {}
    for used in (tensorrt_vendor.NAMES, tensorrt_vendor.CLASSIC_NAMES, nvidia.TENSORRT_NAMES):
        for owner, wanted in used.items():
            merged.setdefault(owner, set()).update(wanted)
    return {owner: sorted(wanted) for owner, wanted in sorted(merged.items())}


def probe(python: str, work: Path, wanted: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What `probe.py` finds in the environment of this interpreter."""
    work.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [python, str(PROBE), str(work)], input=json.dumps(wanted), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{PROBE.name}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> int:
    """Check every version."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".venv-peers/tensorrt_classic"))
    parser.add_argument("--require", action="append", help="the bindings' requirement; repeatable")
    arguments = parser.parse_args()
    lacking = False
    for number, requirement in enumerate(arguments.require or VERSIONS):
        home = arguments.work / str(number)
        venv.create(home, with_pip=True, clear=True)
        python = str(home / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", requirement], check=True)
        found = probe(python, home / "stubs", names())
        lacking |= bool(found["missing"])
        print(json.dumps({"bindings": requirement, **found}), flush=True)
    return int(lacking)


if __name__ == "__main__":
    sys.exit(main())
