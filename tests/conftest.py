"""Fixtures that several test packages share."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

# One thread a test process: the models are tiny, two workers share two cores, and threads that wait for each other
# cost far more than they save. Set before torch is imported; the tests' own subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from hypersd_export import worker
from tests.forked import popen
from tests.tiny import tiny_sd


def pytest_collection_finish() -> None:
    """What the imports of all test files made stays; to look through it again and again is a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion pipeline as a diffusers folder."""
    return tiny_sd(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session", autouse=True)
def forked_workers() -> Iterator[None]:
    """A stage's own process is a fork of this one (see `tests.forked`)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "subprocess", SimpleNamespace(Popen=popen, PIPE=worker.subprocess.PIPE))
        yield
