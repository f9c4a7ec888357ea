"""A search on the nodes of a real Slurm job."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import SlurmLab, job_of
from tests.conftest import command


def write_search(place: Path, recipe: Path, steps: int, ranks: int = 2) -> None:
    search = {
        "recipe": str(recipe),
        "settings": {"train.steps": steps, "train.eval_every": steps // 4, "train.log_every": steps // 4},
        "space": {"train.lr": {"loguniform": [1e-3, 1e-1]}},
        "trials": 4,
        "resources": {"ranks": ranks, "cpus_per_rank": 2, "pack": 2},
    }
    (place / "mine.yaml").write_text(yaml.safe_dump(search))


def test_a_requeued_search_over_two_nodes(slurm: SlurmLab, tiny_recipe: Path, tmp_path: Path) -> None:
    """Nodes of two CPUs: the ranks of a pack do not fit on one."""
    write_search(tmp_path, tiny_recipe, steps=80)
    done = command("submit", "tune", "mine.yaml", "--nodes", 2, "--cpus-per-rank", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "mine.yaml").write_text("recipe: changed")  # too late to matter
    job, search = job_of(done.stdout), tmp_path / "searches" / "mine"
    wait_for_a_step(search)
    slurm.call("scontrol", "requeue", job)
    shown = command("jobs", cwd=tmp_path).stdout
    assert re.search(rf"mine +{job} ", shown), shown
    found = slurm.wait(job, timeout_s=400)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), log_of(search)
    result = json.loads((search / "result.json").read_text())
    assert (result["trials"], result["finished"], result["failed"]) == (4, 4, 0)
    for path in search.glob("trials/*"):
        assert steps_of(path) == [20, 40, 60, 80]
        assert json.loads((path / "result.json").read_text())["world_size"] == 2
    shown = command("jobs", cwd=tmp_path).stdout
    assert re.search(rf"mine +{job} +finished +4 of 4 trials +accuracy [\d.]+ \(trial 00\d\)", shown), shown


def test_a_cancelled_search_goes_on_when_it_is_submitted_again(
    slurm: SlurmLab, tiny_recipe: Path, tmp_path: Path
) -> None:
    write_search(tmp_path, tiny_recipe, steps=80, ranks=1)
    words = ["submit", "tune", "mine.yaml", "--nodes", 1, "--cpus-per-rank", 2]
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    job, search = job_of(done.stdout), tmp_path / "searches" / "mine"
    wait_for_a_step(search)
    done = command("cancel", "searches/mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    slurm.wait(job, timeout_s=120)
    assert not (search / "result.json").exists()
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = slurm.wait(job_of(done.stdout), timeout_s=400)
    assert found["JobState"] == "COMPLETED", log_of(search)
    result = json.loads((search / "result.json").read_text())
    assert (result["trials"], result["finished"], result["failed"]) == (4, 4, 0)
    for path in search.glob("trials/*"):
        assert steps_of(path) == [20, 40, 60, 80]


def wait_for_a_step(search: Path) -> None:
    deadline = time.monotonic() + 240
    while not any(path.stat().st_size for path in search.glob("trials/*/metrics.jsonl")):
        assert time.monotonic() < deadline, log_of(search)
        time.sleep(0.2)


def steps_of(trial: Path) -> list[int]:
    """Steps whose training loss was kept, each as often as it was."""
    lines = (json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "train/loss" in line]


def log_of(search: Path) -> str:
    return "".join(path.read_text() for path in (search / "job").glob("*.log"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such-search"], "no search 'no-such-search'"),
        (["cb-asha", "--partition", "gpuhuge"], "--partition 'gpuhuge' does not exist"),
        (["cb-asha", "--seeds", "0-3"], "--seeds is for `submit train`"),
        (["cb-asha", "--nodes", "auto"], "--nodes auto is for `submit train`"),
        (["cb-asha", "--space.train.lrr", "[1]"], "did you mean 'space.train.lr'"),
        (["cb-asha", "--settings.encoder.path", "/no/such/encoder"], "/no/such/encoder does not exist"),
    ],
)
def test_what_cannot_run_is_not_submitted(
    slurm: SlurmLab, tmp_path: Path, words: list[str], said: str
) -> None:
    done = command("submit", "tune", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []
