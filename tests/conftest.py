"""Fixtures that several test packages share."""

from pathlib import Path

import pytest

from tests.tiny import tiny_sd


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion pipeline as a diffusers folder."""
    return tiny_sd(tmp_path_factory.mktemp("tiny"))
