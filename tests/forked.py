"""Workers as forks of the test process: a `python -m MODULE` would import torch, diffusers and onnx anew each time.

That is six seconds of a processor for each of the many exports in these tests. What a fork has besides is what its
parent has imported; everything else is as in a process of its own: pid, memory, exit code, pipes and signals.
"""

import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from typing import IO, Any

PYTHON = sys.executable
MODULES = ("hypersd_export.verify.worker", "hypersd_export.coreml_worker")
"""Those that import torch, diffusers and all that."""


def popen(command: Sequence[str], **options: Any) -> Any:
    """A fork for `[PYTHON, "-m", MODULE, ARGUMENT …]` of the `MODULES`, `subprocess.Popen` for any other program."""
    if tuple(command[:2]) == (PYTHON, "-m") and command[2] in MODULES:
        return Forked(command[2], command[3:], stderr=options["stderr"])
    return subprocess.Popen(command, **options)


class Forked:
    """What `hypersd_export.worker` uses of a `Popen` with a pipe for its standard output."""

    def __init__(self, module: str, arguments: Sequence[str], *, stderr: IO[Any]) -> None:
        reads, writes = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _become(module, arguments, writes, stderr.fileno())
        os.close(writes)
        self.stdout = os.fdopen(reads, "r", errors="replace")
        self.code: int | None = None

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.wait()

    def terminate(self) -> None:
        """As `Popen.terminate`."""
        if self.code is None:
            os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> int:
        """The exit code, or minus the signal, as `Popen.wait` gives it."""
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code


def _become(module: str, arguments: Sequence[str], stdout: int, stderr: int) -> None:
    """In the child: run the module as `python -m` would, and end without what pytest has to clear up."""
    code = 1
    try:
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
