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
from gpc_dist.runs.folder import RunFolder
from gpc_dist.shipped import shipped_folder
from gpc_dist.tracking.state import ExportState
from tests.cluster.conftest import HELD, STEPS, Refuse, job_of, same_run
from tests.conftest import losses
from tests.holds import Hold
from tests.processes import TIMEOUT_S, command, on_ranks, wait_until
from tests.slurms import SlurmLab, recorded_once
from tests.test_interpreter import MODULES

pytestmark = pytest.mark.slurm


def test_a_run_is_shown_and_cancelled_and_goes_on(
    slurm: SlurmLab, long_recipe: Path, mlflow_store: Path, tmp_path: Path
) -> None:
    """On two nodes; then as two ranks of one node: together they give the losses of two ranks without Slurm."""
    from mlflow import MlflowClient

    run = RunFolder(tmp_path / "runs" / "tiny")
    run.path.parent.mkdir()
    shutil.copy(mlflow_store, tmp_path / "runs" / "mlflow.db")
    settings = ("--engine.zero_stage", 3)
    hold = Hold(run.path, HELD)
    done = command("submit", "train", long_recipe, "--nodes", 2, *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    job = job_of(done.stdout)
    again = command("submit", "train", long_recipe, cwd=tmp_path)
    assert again.returncode == 2
    assert f"has job {job}" in again.stderr
    undisturbed = tmp_path / "undisturbed"
    words = ("train", long_recipe, *settings, "--run.dir", undisturbed, "--tracking.enabled", "false")
    here = on_ranks(2, *words)
    assert here.returncode == 0, here.stderr

    hold.wait()
    shown = command("jobs", cwd=tmp_path).stdout
    assert re.search(rf"tiny +{job} +running +node\[01-02\]", shown), shown
    facts = json.loads(run.facts.read_text())
    assert (facts["slurm_job_id"], facts["slurm_nodes"]) == (job, "node[01-02]")
    wait_until(lambda: ExportState.load(run).run_id is not None)
    waiting = slurm.submit("--hold", "--output=/dev/null", "--wrap=true", cwd=tmp_path)
    cancelled = command("cancel", "runs/tiny", waiting, cwd=tmp_path)
    assert f"asked to end: {job}, {waiting}" in cancelled.stdout
    for each in (job, waiting):
        found = slurm.wait(each)
        assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0")
    shown = command("jobs", "runs/tiny", cwd=tmp_path).stdout
    assert re.search(rf"tiny +{job} +stopped", shown), shown
    assert "SIGTERM at step" in shown
    # Slurm may have ended the exporter before it could tell MLflow
    assert command("sync", run.path).returncode == 0
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    recorded = client.get_run(str(ExportState.load(run).run_id))
    assert recorded.info.status == "KILLED"
    assert recorded.data.tags["gpc.state"] == "stopped"

    elsewhere = ("--nodes", 1, "--ranks-per-node", 2, "--cpus-per-rank", 2, "--follow")
    done = command("submit", "train", long_recipe, *elsewhere, *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"--ntasks-per-node=2", "--mincpus=4"} <= set(
        json.loads((run.job / "job.json").read_text())["sbatch"]
    )
    assert json.loads(run.result.read_text())["world_size"] == 2
    same_run(run.path, undisturbed)
    recorded_once(run.path, STEPS)


def test_an_array_of_seeds_is_kept_as_it_was_submitted(
    slurm: SlurmLab, tiny_recipe: Path, tmp_path: Path, mlflow_store: Path
) -> None:
    """One of its tasks also when Slurm starts it a second time."""
    from mlflow import MlflowClient

    runs = tmp_path / "runs"
    runs.mkdir()
    shutil.copy(mlflow_store, runs / "mlflow.db")
    recipe, regime = tmp_path / "mine.yaml", tmp_path / "mine.json"
    recipe.write_text(tiny_recipe.read_text())
    regime.write_text((shipped_folder("ds_configs") / "zero0.json").read_text().replace("2147483647", "7"))
    settings = ("--train.lr", 0.02, "--engine.ds_config", regime.name)
    first, second = (runs / f"tiny-seed-{seed}" for seed in (42, 20240))
    own = ("--run.seed", 20240, "--run.name", second.name, "--run.dir", tmp_path / "undisturbed")
    here = command("train", recipe, *settings, *own, cwd=tmp_path)
    assert here.returncode == 0, here.stderr
    hold = Hold(second, 6)
    done = command(
        *("submit", "train", recipe, "--seeds", "42,20240", "--nodes", 1, "--ranks-per-node", 1),
        *("--sbatch=--array=0-1%2", "--time", 10, "--snapshot", *settings),
        *("--tracking.enabled", "true", "--tracking.finish_timeout_s", TIMEOUT_S),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for path in (recipe, regime):
        path.write_text("changed")  # too late to matter
    job = job_of(done.stdout)
    assert slurm.job(f"{job}_1")["ArrayTaskThrottle"] == "2"
    hold.wait()
    slurm.call("scontrol", "requeue", f"{job}_1")
    ended = [slurm.wait(f"{job}_{task}") for task in range(2)]
    assert [(found["JobState"], found["Restarts"]) for found in ended] == [
        ("COMPLETED", "0"),
        ("COMPLETED", "1"),
    ]
    same_run(second, tmp_path / "undisturbed")
    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'gpc-dist'")
    recorded = client.search_runs([experiment.experiment_id], "tags.group = 'tiny'")
    assert sorted(run.info.run_name for run in recorded) == [second.name, first.name]
    assert {run.info.status for run in recorded} == {"FINISHED"}
    assert sorted(run.data.params["run.seed"] for run in recorded) == ["20240", "42"]
    assert losses(first) != losses(second)
    table = command("jobs", cwd=tmp_path).stdout
    (code,) = first.glob("job/code-*")
    assert list(code.glob("gpc_dist/training/__pycache__/*.pyc"))  # it has been run
    for task, folder in enumerate((first, second)):
        assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["lr"] == 0.02
        assert json.loads((folder / "job" / "ds_configs" / regime.name).read_text())["steps_per_print"] == 7
        record = json.loads((folder / "job" / "job.json").read_text())
        assert record["job_id"] == f"{job}_{task}"
        assert record["command"][:3] == ["gpc-dist", "submit", "train"]
        assert str(code / "train.sbatch") in record["sbatch"]
        log = folder / "job" / f"{job}.log"
        assert Path(record["log"]) == log
        assert "gpc-dist train" in log.read_text()
        assert re.search(rf"{folder.name} +{job}_{task} +finished +100 % +accuracy", table), table
    assert "exit code" not in (first / "job" / f"{job}.log").read_text()


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
    """Beside scripts of the user that have the names of modules: no rank imports them."""
    for name in MODULES:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} of the user was imported')\n")
    own = sorted(tmp_path.iterdir())
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
    assert sorted(tmp_path.iterdir()) == own


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
