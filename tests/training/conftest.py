"""What tests of runs share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import gpc


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    """The folder of a finished run on the tiny data; tests that change one copy it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert gpc("train", tiny_recipe, "--run.dir", folder) == 0
    return folder
