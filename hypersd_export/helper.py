"""A second process that builds components while the export builds the UNet: `python -m hypersd_export.helper REQUEST`

Tracing and translating a network is Python on one core, and so are the imports before it. Whoever makes a component's
folder first builds it there, the helper from the front of its list and the export from the end. The helper is of use
alone: where it dies, the export builds what it had begun.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from hypersd_export import collector
from hypersd_export.component import ComponentTask
from hypersd_export.errors import HypersdError
from hypersd_export.graphs.spec import Component
from hypersd_export.verify.source import open_source
from hypersd_export.worker import reported_error, run_worker, serve, why_died

if TYPE_CHECKING:
    import subprocess

MODULE = "hypersd_export.helper"
LEAST_BYTES = 100_000_000
"""Of weights: below this, importing torch once more costs more than the helper's work."""
ROOM_BYTES = 2_000_000_000
"""Of free memory that must be there besides three times the helper's weights: ours, measured on SD 1.5 and SDXL."""


def pays(files: Sequence[Path]) -> bool:
    """Whether a helper for components with these weight files is worth its imports, and has a core and the memory."""
    import psutil

    size = sum(path.stat().st_size for path in set(files))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores > 1 and size >= LEAST_BYTES and psutil.virtual_memory().available >= ROOM_BYTES + 3 * size


class Helper:
    """The other process, from `with` on until its end; `folder` is an empty one on the disk of the results."""

    def __init__(self, task: ComponentTask, components: Sequence[Component], folder: Path) -> None:
        self.folder = folder
        self._ends: dict[Component, Future[None]] = {component: Future() for component in components}
        self._process: subprocess.Popen[str] | None = None
        self._begun = threading.Event()
        request = {"task": task.to_json(), "components": list(components), "folder": str(folder)}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        self._thread = threading.Thread(target=self._run, name=MODULE, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._begun.wait()
        if self._process is not None:
            self._process.terminate()
        self._thread.join()

    def took(self, component: Component, folder: Path) -> bool:
        """Whether the helper builds this component; if so, what it wrote is in `folder` when this returns.

        False: it is the caller's to build now. Raises the `HypersdError` that the helper met.
        """
        if component not in self._ends or _claim(self.folder / component):
            return False
        try:
            self._ends[component].result()
        except _Gone:
            return False
        for path in (self.folder / component).iterdir():
            path.rename(folder / path.name)
        return True

    def _run(self) -> None:
        reason: BaseException = _Gone("ended early")
        try:
            report = run_worker(
                MODULE, self.folder / "request.json", self.folder / "report.json", progress=self._finished,
                failure=lambda code, log: _Gone(why_died("the helper", code, log, way_out="")), started=self._started,
            )  # fmt: skip
            if "error" in report:
                reason = reported_error(report["error"])
        except (HypersdError, KeyboardInterrupt, OSError, ValueError):
            pass  # it is of use alone
        self._begun.set()
        for end in self._ends.values():
            if not end.done():
                end.set_exception(reason)

    def _started(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._begun.set()

    def _finished(self, line: str) -> None:
        with contextlib.suppress(ValueError, KeyError):  # what some library prints
            self._ends[Component(line)].set_result(None)


class _Gone(HypersdError):  # noqa: N818 - caught here, never shown
    """The helper ended without a word."""


def _claim(folder: Path) -> bool:
    """Whether we are the first to make it."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def help_out(request: Mapping[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """The helper's work: each component that nobody has begun; `progress` is told each one that is done."""
    task, folder = ComponentTask.from_json(request["task"]), Path(request["folder"])
    source = open_source(task.source)
    for component in map(Component, request["components"]):
        if _claim(folder / component):
            task.build(source, component, folder / component)
            progress(component.value)
    return {}


def main(arguments: list[str] | None = None) -> int:
    """Read the request, build, write the report."""
    path = Path((sys.argv[1:] if arguments is None else arguments)[0])
    request = json.loads(path.read_text(encoding="utf-8"))
    collector.none_at_exit()
    with collector.paused():
        return serve(lambda: help_out(request, lambda line: print(line, flush=True)), path.with_name("report.json"))


if __name__ == "__main__":
    sys.exit(main())
