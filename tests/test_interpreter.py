"""A folder in which a command is started holds data: its modules are imported in no process of the program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpc_dist import interpreter
from gpc_dist.runs.folder import RunFolder
from gpc_dist.tracking.state import ExportState
from tests.conftest import ROOT, losses
from tests.processes import cold_command

MODULES = (
    "__future__ argparse datasets fnmatch logging mlflow numpy pathlib pydantic random re socket tokenizers torch "
    "transformers yaml".split()
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of somebody who gave scripts the names of packages."""
    for name in MODULES:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} of the user was imported')\n")
    return tmp_path


def test_a_command_starts_beside_any_module(place: Path) -> None:
    done = cold_command("train", "no-recipe", cwd=place)
    assert done.returncode == 2, done.stderr
    assert "no recipe 'no-recipe'" in done.stderr


def test_the_first_modules_are_not_taken_from_there_either(place: Path) -> None:
    """`site` runs before, and what it imports hides what this program would; so it is left out here."""
    packages = os.pathsep.join([str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))])
    done = subprocess.run(
        [sys.executable, "-S", "-m", "gpc_dist", "train", "no-recipe"],
        cwd=place,
        env=os.environ | {"PYTHONPATH": packages},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "no recipe 'no-recipe'" in done.stderr


def test_a_checkout_that_is_not_installed_is_found_by_the_processes_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "flags", SimpleNamespace(safe_path=False))
    monkeypatch.setattr(os, "environ", {"PYTHONPATH": "elsewhere"})
    for here, left in ((ROOT, f"{ROOT}{os.pathsep}elsewhere"), (ROOT.parent, "elsewhere")):
        monkeypatch.setattr(sys, "path", [str(here), "installed"])
        os.environ["PYTHONPATH"] = "elsewhere"
        interpreter.leave_current_folder()
        assert (sys.path, os.environ["PYTHONPATH"]) == (["installed"], left)


def test_processes_of_libraries_leave_it_alone_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    interpreter.protect_children()
    words = [sys.executable, "-c", "import random; print(random.__file__)"]
    found = subprocess.run(words, cwd=place, env=os.environ, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).parent != place


@pytest.mark.slow
def test_ranks_and_the_exporter_leave_it_alone(place: Path, tiny_recipe: Path, mlflow_store: Path) -> None:
    (place / "runs").mkdir()
    shutil.copy(mlflow_store, place / "runs" / "mlflow.db")
    more = ("--engine.ranks", 2, "--tracking.enabled", "true", "--run.dir", "runs/tiny")
    done = cold_command("train", tiny_recipe, *more, cwd=place)
    assert done.returncode == 0, done.stderr
    run = RunFolder(place / "runs" / "tiny")
    assert len(losses(run.path)) == 12
    state = ExportState.load(run)
    assert state.complete, run.tracking_log.read_text()
