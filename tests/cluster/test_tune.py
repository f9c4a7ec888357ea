"""A search on the nodes of a real Slurm job."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import Refuse, job_of
from tests.holds import Hold
from tests.processes import command, wait_until
from tests.slurms import SlurmLab

pytestmark = pytest.mark.slurm


def test_a_search_that_is_requeued_and_then_cancelled_goes_on(
    slurm: SlurmLab, tiny_recipe: Path, tmp_path: Path
) -> None:
    """Over two nodes of two CPUs: the ranks of a pack do not fit on one."""
    search, file = tmp_path / "searches" / "mine", tmp_path / "mine.yaml"
    text = yaml.safe_dump(
        {
            "recipe": str(tiny_recipe),
            "settings": {"train.steps": 40, "train.eval_every": 10, "train.log_every": 10},
            "space": {"train.lr": {"loguniform": [1e-3, 1e-1]}},
            "trials": 4,
            "resources": {"ranks": 2, "cpus_per_rank": 2, "pack": 2},
            "tracking": {"enabled": False},
        }
    )
    # the first is for a start that is to be requeued before it gets there
    first, second = (Hold(search / "trials" / "000", step) for step in (20, 30))
    guard = Hold(search / "trials" / "003", 20)  # lest the search be done before it hears of its end

    def submit() -> str:
        file.write_text(text)
        done = command("submit", "tune", file.name, "--nodes", 2, "--cpus-per-rank", 2, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        file.write_text("recipe: changed")  # too late to matter
        return job_of(done.stdout)

    def told_to_end(times: int) -> None:
        wait_until(lambda: log_of(search).count("ended by Slurm") == times, failed=lambda: log_of(search))

    job = submit()
    wait_until((search / "status.json").exists, failed=lambda: log_of(search))  # it begins
    slurm.call("scontrol", "requeue", job)
    told_to_end(1)
    first.release()
    second.wait(lambda: log_of(search))
    assert slurm.job(job)["Restarts"] == "1"
    shown = command("jobs", cwd=tmp_path).stdout
    assert re.search(rf"mine +{job} ", shown), shown

    done = command("cancel", "searches/mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told_to_end(2)
    second.release()
    assert slurm.wait(job)["JobState"] == "CANCELLED", log_of(search)
    guard.release()
    assert not (search / "result.json").exists()

    job = submit()
    assert slurm.wait(job)["JobState"] == "COMPLETED", log_of(search)
    result = json.loads((search / "result.json").read_text())
    assert (result["trials"], result["finished"], result["failed"]) == (4, 4, 0)
    for path in search.glob("trials/*"):
        assert steps_of(path) == [10, 20, 30, 40]
        assert json.loads((path / "result.json").read_text())["world_size"] == 2
    shown = command("jobs", cwd=tmp_path).stdout
    assert re.search(rf"mine +{job} +finished +4 of 4 trials +accuracy [\d.]+ \(trial 00\d\)", shown), shown


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
        (["cb-asha", "--sbatch=--array=0-3"], "would run every task in the same folder"),
        (["cb-asha", "--time", "2"], "leaves no time to train"),
        (["cb-asha", "--seeds", "0-3"], "--seeds is for `submit train`"),
        (["cb-asha", "--nodes", "auto"], "--nodes auto is for `submit train`"),
        (["cb-asha", "--space.train.lrr", "[1]"], "did you mean 'space.train.lr'"),
        (["cb-asha", "--settings.encoder.path", "/no/such/encoder"], "/no/such/encoder does not exist"),
    ],
)
def test_what_cannot_run_is_not_submitted(refuse: Refuse, words: list[str], said: str) -> None:
    refuse("tune", words, said)
