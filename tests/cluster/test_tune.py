"""A search on the nodes of a real Slurm job."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import Refuse, SlurmLab, job_of
from tests.holds import Hold
from tests.processes import command, wait_until

pytestmark = pytest.mark.slurm


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
    write_search(tmp_path, tiny_recipe, steps=40)
    search = tmp_path / "searches" / "mine"
    hold, guard = holds(search)
    done = command("submit", "tune", "mine.yaml", "--nodes", 2, "--cpus-per-rank", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "mine.yaml").write_text("recipe: changed")  # too late to matter
    job = job_of(done.stdout)
    hold.wait(lambda: log_of(search))
    slurm.call("scontrol", "requeue", job)
    wait_until(lambda: "ended by Slurm" in log_of(search))
    hold.release()
    slurm.wait_for(job, lambda found: found["Restarts"] == "1")
    guard.release()
    shown = command("jobs", cwd=tmp_path).stdout
    assert re.search(rf"mine +{job} ", shown), shown
    found = slurm.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), log_of(search)
    result = json.loads((search / "result.json").read_text())
    assert (result["trials"], result["finished"], result["failed"]) == (4, 4, 0)
    for path in search.glob("trials/*"):
        assert steps_of(path) == [10, 20, 30, 40]
        assert json.loads((path / "result.json").read_text())["world_size"] == 2
    shown = command("jobs", cwd=tmp_path).stdout
    assert re.search(rf"mine +{job} +finished +4 of 4 trials +accuracy [\d.]+ \(trial 00\d\)", shown), shown


def test_a_cancelled_search_goes_on_when_it_is_submitted_again(
    slurm: SlurmLab, tiny_recipe: Path, tmp_path: Path
) -> None:
    write_search(tmp_path, tiny_recipe, steps=40, ranks=1)
    search = tmp_path / "searches" / "mine"
    hold, guard = holds(search)
    words = ["submit", "tune", "mine.yaml", "--nodes", 1, "--cpus-per-rank", 2]
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    hold.wait(lambda: log_of(search))
    job = job_of(done.stdout)
    done = command("cancel", "searches/mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: "ended by Slurm" in log_of(search))
    hold.release()
    slurm.wait(job)
    guard.release()
    assert not (search / "result.json").exists()
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = slurm.wait(job_of(done.stdout))
    assert found["JobState"] == "COMPLETED", log_of(search)
    result = json.loads((search / "result.json").read_text())
    assert (result["trials"], result["finished"], result["failed"]) == (4, 4, 0)
    for path in search.glob("trials/*"):
        assert steps_of(path) == [10, 20, 30, 40]


def holds(search: Path) -> tuple[Hold, Hold]:
    """The first trial is held until the job was asked to end; the last one, lest it be done before it hears of it."""
    return Hold(search / "trials" / "000", 20), Hold(search / "trials" / "003", 20)


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
def test_what_cannot_run_is_not_submitted(refuse: Refuse, words: list[str], said: str) -> None:
    refuse("tune", words, said)
