"""What all tests share: a tiny encoder with random weights, a tiny data set, and the command line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpc_dist import cli
from tests import tiny
from tests.rays import ray_cluster
from tests.slurms import SlurmLab, slurm_lab

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait do not take the cores from others
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each process compiles the program again
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - its own 15 starves workers beside others
# processes run this checkout, and can be held (see `holds`), wherever they are started
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT), str(ROOT / "tests" / "holding"), os.environ.get("PYTHONPATH")])
)

TOGETHER = {
    "tests/cluster": "slurm",
    "tests/faults/test_slice.py::test_faults_in_jobs": "slurm",
    "tests/search/test_tuner.py": "ray",
    "tests/search/test_ray_cluster.py": "ray",
    "tests/study/test_run.py": "ray",
    "tests/inference/server/test_ray_serve.py": "ray",
    "tests/faults/test_searches.py": "ray",
    "tests/tracking": "mlflow",
}
"""Tests, by what their ids begin with, that share what runs on this machine once."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, so that no worker begins it when the others have ended."""
    import torch

    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    order = ("slurm", "ray", "slow")
    items.sort(key=lambda item: next((place for place, name in enumerate(order) if name in item.keywords), 9))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        """One worker has all tests of a file, which share its fixtures, or that stand `TOGETHER`."""

        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((group for place, group in TOGETHER.items() if nodeid.startswith(place)), file)

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def _places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESTS_HOLDS", str(tmp_path_factory.mktemp("holds")))
        patch.setenv("GPC_DIST_CACHE", str(tmp_path_factory.mktemp("states")))
        yield


@pytest.fixture(scope="session")
def superglue() -> Path:
    """The folder with the official SuperGLUE files, where a machine has them."""
    return _shared_data("superglue")


@pytest.fixture(scope="session")
def glue() -> Path:
    """The folder with GLUE's SST-2 and CoLA as JSON Lines, where a machine has them."""
    return _shared_data("glue")


def _shared_data(name: str) -> Path:
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"needs the data files in {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_other_data(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, tiny_data: Path) -> Path:
    return tiny.write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", tiny_encoder, tiny_data)


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store that has been used: a copy of it beside a run spares its exporter the first use."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmLab]:
    """The cluster of all tests that need Slurm."""
    if shutil.which("sbatch") is None:
        reason = "needs Slurm: apt-get install --no-install-recommends slurm-wlm munge"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with slurm_lab() as lab:
        yield lab


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[dict[str, str]]:
    """Environment variables of a Ray cluster for all searches that leave it as it is."""
    with ray_cluster() as environment:
        yield environment


def gpc(*words: object) -> int:
    """Run `gpc-dist` in this process; returns its exit code."""
    return cli.main([str(word) for word in words])


def losses(folder: Path) -> dict[int, float]:
    """Training loss of each step of a run, which may be going on: its last line may be half written."""
    whole, _, _ = (folder / "metrics.jsonl").read_text().rpartition("\n")
    lines = map(json.loads, whole.splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
