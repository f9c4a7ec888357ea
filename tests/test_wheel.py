"""The program without a checkout: a wheel, installed into an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpc_dist import config, schema
from gpc_dist.shipped import SHIPPED, shipped_folder
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

LOADS_ALL = """
import gpc_dist
from gpc_dist import config, schema
from gpc_dist.search import spec
from gpc_dist.shipped import shipped_folder
from gpc_dist.study import spec as study
from gpc_dist.tasks.read import read_rows

print(gpc_dist.__file__)
for name in config.recipe_names():
    config.load(name)
for name in schema.yaml_names(shipped_folder("tune")):
    spec.load(name, {})
for name in schema.yaml_names(shipped_folder("tune") / "studies"):
    study.load(name, {})
for file in shipped_folder("ds_configs").glob("*.json"):
    nvme = {"engine.nvme_path": "/nvme"} if "nvme" in file.stem else {}
    config.load("rte", {"engine.ds_config": file.stem} | nvme)
for split in ("train", "validation"):
    read_rows(config.load("demo").data, split)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that has the wheel, and the packages of this one beside it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("gpc_dist", "ds_configs", "slurm", "tune"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    ways = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    build = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        *ways,
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        source,
    )
    subprocess.run(build, check=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    place = folder / "environment"
    subprocess.run((sys.executable, "-m", "venv", "--without-pip", place), check=True, timeout=120)
    python = place / "bin" / "python"
    install = (sys.executable, "-m", "pip", "--python", python, "install", *ways, wheel)
    subprocess.run(install, check=True, timeout=120, env=without_checkout())
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run((python, "-c", asked), check=True, capture_output=True, text=True).stdout.strip()
    packages = [path for path in sys.path if Path(path).name == "site-packages"]
    Path(own, "beside.pth").write_text("\n".join(packages) + "\n")
    return place / "bin"


def without_checkout() -> dict[str, str]:
    """An environment in which nothing sees this checkout, nor pip that it has the program's metadata already."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*words: object, cwd: Path) -> str:
    """What a command prints."""
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=without_checkout(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_shows_its_help_and_copies_what_is_made_to_be_edited(installed: Path, tmp_path: Path) -> None:
    assert "commands:" in run(installed / "gpc-dist", "--help", cwd=tmp_path)
    run(installed / "gpc-dist", "init", "mine", cwd=tmp_path)
    for name in SHIPPED:
        copied = {
            path.relative_to(tmp_path / "mine" / name) for path in (tmp_path / "mine" / name).rglob("*")
        }
        own = shipped_folder(name)
        kinds = (".yaml", ".json", ".sh", ".sbatch")
        assert {path.relative_to(own) for path in own.rglob("*.*") if path.suffix in kinds} <= copied
    assert config.load(str(tmp_path / "mine" / "recipes" / "rte.yaml")) == config.load("rte")
    assert schema.yaml_names(tmp_path / "mine" / "tune" / "studies")


def test_it_loads_every_file_that_it_brings(installed: Path, tmp_path: Path) -> None:
    imported = Path(run(installed / "python", "-c", LOADS_ALL, cwd=tmp_path).splitlines()[0])
    assert imported.is_relative_to(installed.parent)
