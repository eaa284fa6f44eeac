"""A finished quickstart, for the tests of its pages."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pipeline(quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished quickstart, copied, to be written to."""
    place = tmp_path_factory.mktemp("pages") / quickstart.name
    shutil.copytree(quickstart, place, ignore=shutil.ignore_patterns("checkpoints", "*.safetensors"))
    return place
