"""A search on the nodes of a real Slurm job."""

from __future__ import annotations

import json
import time
from pathlib import Path

import yaml

from tests.cluster.conftest import ROOT, SlurmLab
from tests.cluster.test_survival import log_of
from tests.conftest import losses

SCRIPT = ROOT / "slurm" / "tune.sbatch"


def write_search(place: Path, recipe: Path, steps: int) -> None:
    search = {
        "recipe": str(recipe),
        "settings": {"train.steps": steps, "train.eval_every": steps // 4, "train.log_every": steps // 4},
        "space": {"train.lr": {"loguniform": [1e-3, 1e-1]}},
        "trials": 4,
        "resources": {"pack": 2},
    }
    (place / "mine.yaml").write_text(yaml.safe_dump(search))


def test_a_requeued_search_over_two_nodes(slurm: SlurmLab, tiny_recipe: Path, tmp_path: Path) -> None:
    write_search(tmp_path, tiny_recipe, steps=2000)
    job = slurm.submit("--nodes=2", SCRIPT, "mine.yaml", cwd=tmp_path)
    search = tmp_path / "searches" / "mine"
    deadline = time.monotonic() + 180
    while not any(path.stat().st_size for path in search.glob("trials/*/metrics.jsonl")):
        assert time.monotonic() < deadline, log_of(tmp_path)
        time.sleep(0.5)
    slurm.call("scontrol", "requeue", job)
    found = slurm.wait(job, timeout_s=400)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), log_of(tmp_path)
    result = json.loads((search / "result.json").read_text())
    assert (result["trials"], result["finished"], result["failed"]) == (4, 4, 0)
    for path in search.glob("trials/*"):
        assert sorted(losses(path)) == [500, 1000, 1500, 2000]
