"""The other side of `benchmarks.bench.protocol`: a painter's process that is started, asked, and never outlives us."""

import contextlib
import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Self

from hypersd_export.errors import HypersdError
from hypersd_export.worker import reported_error, why_died

CLOSE_S = 10.0


class Conversation:
    """One painter. `environment` is laid over this process's own; `timeout`: seconds that an answer may take.

    What fails is a `HypersdError` in one line; after that the painter is not asked again.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, timeout: float, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name, self._timeout = name, timeout
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed with the conversation)
        self._answers: queue.Queue[str] = queue.Queue()
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, errors="replace",
                env={**os.environ, **(environment or {})},
            )  # fmt: skip
        except OSError as error:
            self._log.close()
            raise HypersdError(f"{name}: {command[0]} does not start ({error.strerror})") from error
        threading.Thread(target=self._listen, name=f"answers of {name}", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    @property
    def pid(self) -> int:
        """The painter's process number."""
        return self._process.pid

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer to one question; `HypersdError` for an error, an end without an answer, or none in time."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=self._timeout)
        except queue.Empty:
            self.close()
            raise HypersdError(f"{self.name}: no answer in {self._timeout:g} s; give --timeout") from None
        except OSError:
            line = ""
        if not line:
            raise HypersdError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise reported_error({**answer["error"], "message": f"{self.name}: {answer['error']['message']}"})
        return answer

    def close(self) -> None:
        """End the painter: by the end of its questions, or by force after CLOSE_S."""
        if self._log.closed:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(CLOSE_S)
        finally:  # after Ctrl-C as well
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
            self._log.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # closed while it was read
            for line in self._process.stdout:
                self._answers.put(line)
        self._answers.put("")

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        return why_died(self.name, code, self._log.read(), way_out="leave it out, or see its standard error")
