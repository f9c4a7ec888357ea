"""`gpc-dist submit`, `jobs`, `cancel` and `doctor --slurm` against the real cluster."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gpc_dist.cluster import slurm as cluster_slurm
from gpc_dist.shipped import shipped_folder
from tests.cluster.conftest import HELD, Refuse, SlurmLab, job_of, same_run
from tests.conftest import losses
from tests.holds import Hold
from tests.processes import TIMEOUT_S, command, on_ranks

pytestmark = pytest.mark.slurm


def test_two_nodes_give_the_losses_of_two_ranks(slurm: SlurmLab, superglue: Path, tmp_path: Path) -> None:
    settings = [
        *("--data.path", superglue / "RTE", "--data.limit_train", 64, "--data.limit_eval", 16),
        *("--train.steps", 6, "--train.batch_size", 8, "--train.log_every", 1, "--engine.zero_stage", 3),
        *("--engine.device", "cpu", "--tracking.enabled", "false"),
    ]
    here = on_ranks(2, "train", "rte", *settings, "--run.dir", tmp_path / "here")
    assert here.returncode == 0, here.stderr
    done = command(
        "submit", "train", "rte", "--nodes", 2, "--follow", *settings, "--run.dir", "there", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(tmp_path / "here")) == 6
    same_run(tmp_path / "there", tmp_path / "here")
    facts = json.loads((tmp_path / "there" / "facts.json").read_text())
    assert facts["slurm_job_id"] == job_of(done.stdout)
    assert facts["slurm_nodes"] == "node[01-02]"


def test_a_submission_is_kept_as_it_was(slurm: SlurmLab, tiny_recipe: Path, tmp_path: Path) -> None:
    recipe, regime = tmp_path / "mine.yaml", tmp_path / "mine.json"
    recipe.write_text(tiny_recipe.read_text())
    regime.write_text(
        (shipped_folder("ds_configs") / "zero0.json").read_text().replace("{", '{"mine": 7,', 1)
    )
    done = command(
        *("submit", "train", recipe, "--nodes", 1, "--time", 5, "--snapshot"),
        *("--train.lr", 0.02, "--engine.ds_config", regime.name),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for path in (recipe, regime):
        path.write_text("changed")  # too late to matter
    job = job_of(done.stdout)
    assert slurm.wait(job)["JobState"] == "COMPLETED"
    folder = tmp_path / "runs" / "tiny"
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["lr"] == 0.02
    assert json.loads((folder / "ds_config.json").read_text())["mine"] == 7
    (code,) = folder.glob("job/code-*")
    assert list(code.glob("gpc_dist/training/__pycache__/*.pyc"))  # it has been run
    record = json.loads((folder / "job" / "job.json").read_text())
    assert record["job_id"] == job
    assert record["command"][:3] == ["gpc-dist", "submit", "train"]
    assert str(code / "train.sbatch") in record["sbatch"]
    assert "exit code" not in Path(record["log"]).read_text()
    table = command("jobs", cwd=tmp_path).stdout
    assert re.search(rf"tiny +{job} +finished +100 % +accuracy", table), table


def test_an_array_of_seeds(slurm: SlurmLab, tiny_recipe: Path, tmp_path: Path, mlflow_store: Path) -> None:
    from mlflow import MlflowClient

    (tmp_path / "runs").mkdir()
    shutil.copy(mlflow_store, tmp_path / "runs" / "mlflow.db")
    done = command(
        *("submit", "train", tiny_recipe, "--seeds", "42,20240", "--ranks-per-node", 1),
        "--sbatch=--array=0-1%2",
        *("--tracking.enabled", "true", "--tracking.finish_timeout_s", TIMEOUT_S),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    job = job_of(done.stdout)
    assert slurm.job(f"{job}_1")["ArrayTaskThrottle"] == "2"
    for task in range(2):
        assert slurm.wait(f"{job}_{task}")["JobState"] == "COMPLETED"
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'gpc-dist'")
    runs = client.search_runs([experiment.experiment_id], "tags.group = 'tiny'")
    assert sorted(run.info.run_name for run in runs) == ["tiny-seed-20240", "tiny-seed-42"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sorted(run.data.params["run.seed"] for run in runs) == ["20240", "42"]
    folders = [tmp_path / "runs" / f"tiny-seed-{seed}" for seed in (42, 20240)]
    assert len({tuple(losses(folder).values()) for folder in folders}) == 2
    for folder in folders:
        record = json.loads((folder / "job" / "job.json").read_text())
        assert Path(record["log"]) == folder / "job" / f"{job}.log"
        assert "gpc-dist train" in Path(record["log"]).read_text()


def test_an_array_of_settings(slurm: SlurmLab, tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "settings").write_text(
        "# two of them\n--train.lr 0.01\n\n--train.lr 0.05 --adapter.cell gated\n"
    )
    note = tmp_path / "launcher"  # what a task trains, without training
    note.write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/task-$SLURM_ARRAY_TASK_ID\n')
    note.chmod(0o755)
    words = ("submit", "train", tiny_recipe, "--array", "settings")
    done = command(*words, cwd=tmp_path, GPC_DIST_LAUNCHER=str(note))
    assert done.returncode == 0, done.stderr
    job = job_of(done.stdout)
    for task in range(2):
        assert slurm.wait(f"{job}_{task}")["JobState"] == "COMPLETED"
    started = [(tmp_path / f"task-{task}").read_text().split() for task in range(2)]
    assert [words[:2] for words in started] == [["gpc-dist", "train"]] * 2
    configs = [yaml.safe_load(Path(words[2]).read_text()) for words in started]
    assert [config["run"]["name"] for config in configs] == ["tiny-0", "tiny-1"]
    assert [config["train"]["lr"] for config in configs] == [0.01, 0.05]
    assert [config["adapter"]["cell"] for config in configs] == ["recurrent", "gated"]


def test_jobs_and_cancel(slurm: SlurmLab, long_recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"

    def submit(nodes: int) -> str:
        done = command(
            *("submit", "train", long_recipe, "--nodes", nodes, "--tracking.enabled", "false"), cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return job_of(done.stdout)

    first = Hold(folder, HELD)
    job = submit(2)
    again = command("submit", "train", long_recipe, cwd=tmp_path)
    assert again.returncode == 2
    assert f"has job {job}" in again.stderr
    first.wait()
    shown = command("jobs", cwd=tmp_path).stdout
    assert re.search(rf"tiny +{job} +running +node\[01-02\]", shown), shown
    cancelled = command("cancel", "runs/tiny", cwd=tmp_path)
    assert job in cancelled.stdout
    assert slurm.wait(job)["JobState"] == "CANCELLED"
    shown = command("jobs", "runs/tiny", cwd=tmp_path).stdout
    assert re.search(rf"tiny +{job} +stopped", shown), shown
    assert "SIGTERM at step" in shown
    # submitted again, the run goes on
    second = Hold(folder, max(losses(folder)) + 1)
    job = submit(1)
    second.wait()
    command("cancel", job)
    slurm.wait(job)
    assert sorted(losses(folder)) == list(range(1, max(losses(folder)) + 1))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such-recipe"], "no recipe 'no-such-recipe'"),
        (
            ["rte", "--partition", "gpuhuge"],
            "--partition 'gpuhuge' does not exist: use one of main (default), spot",
        ),
        (["rte", "--nodes", "3"], "--nodes: 3 are asked for, partition 'main' has 2 nodes"),
        (["rte", "--gpus-per-node", "8"], "--gpus-per-node: 8 are asked for, partition 'main' has 2 GPUs"),
        (
            ["rte", "--ranks-per-node", "4", "--cpus-per-rank", "4"],
            "16 are asked for, partition 'main' has 8 CPUs",
        ),
        (["rte", "--time", "2-00:00:00"], "--time 2-00:00:00 is longer than partition 'main' allows (24 h)"),
        (["rte", "--time", "soon"], "'soon' is not a time limit"),
        (
            ["rte", "--time", "2"],
            "--time 2 (120 s) leaves no time to train: the job is told to stop 180 s ahead",
        ),
        (["rte", "--sbatch=--signal=B:USR2@14400"], "--time 04:00:00 (14400 s) leaves no time"),
        (["rte", "--sbatch=--array=0-3%2"], "would run every task in the same folder: give --seeds LIST"),
        (
            ["rte", "--seeds", "42,7", "--sbatch=--array=0-3%2"],
            "is not for 2 runs: give --sbatch=--array=0-1%2",
        ),
        (["rte", "--engine.ds_config", "missing.json"], "engine.ds_config 'missing.json' is neither"),
        (["rte", "--mem", "900G"], "sbatch: "),
        (["rte", "--constraint", "moon"], "sbatch: "),
        (["rte", "--train.lrr", "1"], "did you mean 'train.lr'"),
        (["rte", "--encoder.path", "/no/such/encoder"], "/no/such/encoder does not exist"),
        (["rte", "--data.path", "./no-data"], "data.path ./no-data does not exist"),
        (["rte", "--seeds", "a"], "no list of seeds"),
        (["rte", "--array", "missing"], "cannot read missing: No such file"),
        (["rte", "--nodes", "auto"], "give --gpu"),
    ],
)
def test_what_cannot_run_is_not_submitted(refuse: Refuse, words: list[str], said: str) -> None:
    refuse("train", words, said)


def test_an_array_larger_than_the_cluster_takes(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster_slurm.largest_array() == 1001
    monkeypatch.setattr(cluster_slurm, "largest_array", lambda: 1)
    refuse(
        "train",
        ["rte", "--seeds", "0-1"],
        "2 runs are more than this cluster takes in one array (1: MaxArraySize)",
    )


def test_a_dry_run_shows_the_script_and_writes_nothing(
    slurm: SlurmLab, tiny_recipe: Path, tmp_path: Path
) -> None:
    done = command("submit", "train", tiny_recipe, "--nodes", 2, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sbatch --nodes=2 ")
    assert "#SBATCH --requeue" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_planner_finds_the_nodes(slurm: SlurmLab, tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny_recipe.read_text())
    done = command("submit", "train", recipe, "--nodes", "auto", "--gpu", "h100", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 node(s). Recommended: replicated" in done.stdout
    assert "sbatch --nodes=1 --gpus-per-node=2" in done.stdout


def test_doctor(slurm: SlurmLab, tmp_path: Path) -> None:
    done = command("doctor", "--slurm", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        r"ok +partition main \(default\) +2 nodes with up to 8 CPUs, 62 GiB, 2 GPUs; limit 24 h",
        r"ok +rendezvous +2 ranks on node01, node02 met in",
        r"ok +bandwidth +[\d.]+ GB/s all-reduce \(gloo\)",
        rf"ok +shared folder +{tmp_path} is seen by all",
        r"ok +clocks +\d+ ms apart",
        r"ok +versions +the same on all nodes",
    ):
        assert re.search(line, done.stdout), (line, done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_a_shell_that_srun_opened_is_no_rank(slurm: SlurmLab, tmp_path: Path) -> None:
    """Its variables are those of a task, and of two: the other one has ended."""
    code = "from gpc_dist.distributed.launch import given_ranks; print('one of several:', given_ranks())"
    words, python = ["srun", "--nodes=1", "--ntasks=2"], [sys.executable, "-c", code]
    assert slurm.call(*words, *python).splitlines() == ["one of several: True"] * 2
    shell = ["bash", "-c", f"{shlex.join(python)}; env > {tmp_path}/environment"]
    ours, theirs = os.openpty()
    done = subprocess.run([*words, "--pty", *shell], stdin=theirs, stdout=theirs, stderr=theirs, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 0, shown
    assert "one of several: False" in shown
    assert "SLURM_STEP_NUM_TASKS=2" in (tmp_path / "environment").read_text()


def test_without_slurm(tmp_path: Path) -> None:
    for words in (["submit", "train", "rte"], ["doctor", "--slurm"], ["cancel", "7"]):
        done = command(*words, cwd=tmp_path, PATH=str(tmp_path))
        assert done.returncode == 3
        assert "login node of a Slurm cluster" in done.stderr
