"""The batch scripts, with stand-ins for Slurm's programs: what they start, and what they ask of Slurm at its end.

That a scheduler does what it is asked is shown against a real one (`test_survival`, `test_tune`).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.processes import wait_until

SRUN = """#!/bin/bash
# what it was called with, and what a rank would find in its environment
printf '%s\\n' "$@" > "$FAKES/srun"
env > "$FAKES/environment"
[[ -z ${REFUSAL:-} ]] || echo "$REFUSAL" > "$GPC_DIST_REFUSAL"
if [[ ${CODE:-0} == wait ]]; then
  trap 'exit 75' USR2
  touch "$FAKES/waits"
  while :; do sleep 0.02; done
fi
exit "${CODE:-0}"
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") printf 'node07\\nnode08\\n' ;;
  "show job")
    printf '%s\n' "JobId=$3 JobName=x" "   JobState=${STATE:-RUNNING} Reason=None Dependency=(null)" \
      "   Command=$COMMAND" "   WorkDir=/elsewhere"
    # a whole array
    [[ $3 != "${SLURM_ARRAY_JOB_ID:-}" ]] || printf '\n%s\n' "JobId=1 JobName=x" "   JobState=COMPLETED Reason=None" ;;
  *) echo "$@" >> "$FAKES/asked" ;;
esac
"""
JOB = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NAME": "mine",
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_ON_NODE": "8",
    "SLURM_NTASKS_PER_NODE": "4",
}

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts a batch script in a job of two nodes with four ranks each: a copy of it, as Slurm does."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def start_script(script: str, *words: str, **environment: str) -> subprocess.Popen[str]:
        (tmp_path / "spool").mkdir(exist_ok=True)
        copy = shutil.copy(ROOT / "slurm" / script, tmp_path / "spool" / "slurm_script")
        command = " ".join([str(ROOT / "slurm" / script), *words])
        fakes = {"FAKES": str(tmp_path), "PATH": f"{programs}:{os.environ['PATH']}", "COMMAND": command}
        place = {"SLURM_SUBMIT_DIR": str(tmp_path)}
        without = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        return subprocess.Popen(
            ["bash", copy, *words],
            cwd=tmp_path,
            env=without | JOB | fakes | place | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start_script


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(start: Start) -> Run:
    """Runs a batch script; gives its exit code and what it printed."""

    def run_script(script: str, *words: str, **environment: str) -> tuple[int, str]:
        process = start(script, *words, **environment)
        said, _ = process.communicate()
        return process.returncode, said

    return run_script


def asked(place: Path) -> list[str]:
    """What `scontrol` was asked to do."""
    return (place / "asked").read_text().splitlines() if (place / "asked").exists() else []


def environment(place: Path) -> dict[str, str]:
    """Of a rank."""
    lines = (place / "environment").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


both = pytest.mark.parametrize("script", ["train.sbatch", "tune.sbatch"])


def test_a_run_is_started_on_all_ranks_of_all_nodes(run: Run, tmp_path: Path) -> None:
    code, said = run("train.sbatch", "rte", "--train.lr", "0.01", GPC_DIST_LAUNCHER="enter image.sif")
    assert code == 0, said
    words = (tmp_path / "srun").read_text().splitlines()
    assert {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--kill-on-bad-exit=1"} <= set(words)
    assert words[-7:] == ["enter", "image.sif", "gpc-dist", "train", "rte", "--train.lr", "0.01"]
    found = environment(tmp_path)
    assert (found["MASTER_ADDR"], found["SRUN_CPUS_PER_TASK"], found["OMP_NUM_THREADS"]) == (
        "node07",
        "2",
        "2",
    )


def test_a_search_is_started_once_on_each_node_with_a_secret(run: Run, tmp_path: Path) -> None:
    secrets = set()
    for _ in range(2):
        code, said = run("tune.sbatch", "cb-asha")
        assert code == 0, said
        words = (tmp_path / "srun").read_text().splitlines()
        assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= set(words)
        assert words[-3:] == ["gpc-dist", "tune", "cb-asha"]
        found = environment(tmp_path)
        assert (found["MASTER_ADDR"], found["RAY_AUTH_MODE"]) == ("node07", "token")
        secrets.add(found["RAY_AUTH_TOKEN"])
    assert len(secrets) == 2
    assert all(len(secret) == 64 for secret in secrets)


@both
def test_each_start_of_a_job_has_a_port_of_its_own(run: Run, tmp_path: Path, script: str) -> None:
    ports = []
    for job, restart in (("12", "0"), ("12", "1"), ("13", "0"), ("999999", "3")):
        run(script, "rte", SLURM_JOB_ID=job, SLURM_RESTART_COUNT=restart)
        ports.append(int(environment(tmp_path)["MASTER_PORT"]))
    assert len(set(ports)) == 4
    assert all(20000 <= port < 32000 for port in ports)


def test_tasks_of_an_array_have_their_number_and_one_group(run: Run, tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "9"}
    run("train.sbatch", "rte", "--run.seed", "{task}", "--run.name", "rte-{task}", **array)
    words = (tmp_path / "srun").read_text().splitlines()
    assert words[-6:] == ["--run.seed", "3", "--run.name", "rte-3", "--tracking.group", "mine-9"]
    run("train.sbatch", "rte", "--tracking.group", "night", **array)
    assert (tmp_path / "srun").read_text().splitlines()[-2:] == ["--tracking.group", "night"]


def test_the_last_task_of_an_array_requeues_itself_alone(run: Run, tmp_path: Path) -> None:
    """Its job has the array's id."""
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
    assert "stopped on request: requeued" in run("train.sbatch", "rte", CODE="75", **array)[1]
    assert asked(tmp_path) == ["requeue 9_3"]


@both
@pytest.mark.parametrize(
    ("code", "given", "said", "requeued"),
    [
        (0, {}, "start 0 on node[07-08]", False),
        (75, {}, "stopped on request: requeued", True),
        (75, {"STATE": "COMPLETING"}, "ended with exit code 75, JobState=COMPLETING", False),
        (2, {"REFUSAL": "no such column"}, "not requeued: it would fail again", False),
        (1, {"STATE": "CANCELLED"}, "ended with exit code 1, JobState=CANCELLED", False),
        (1, {}, "failure 1: requeued", True),
        (1, {"GPC_DIST_MAX_FAILURES": "0"}, "given up after 1 failures", False),
    ],
)
def test_what_becomes_of_a_job(
    run: Run, tmp_path: Path, script: str, code: int, given: dict[str, str], said: str, requeued: bool
) -> None:
    found, printed = run(script, "rte", CODE=str(code), **given)
    assert found == code
    assert said in printed
    assert asked(tmp_path) == (["requeue 12"] if requeued else [])


@both
def test_failures_are_counted_over_starts_until_one_succeeds(run: Run, tmp_path: Path, script: str) -> None:
    for number in (1, 2, 3):
        assert f"failure {number}: requeued" in run(script, "rte", CODE="1")[1]
    assert "given up after 4 failures" in run(script, "rte", CODE="1")[1]
    assert asked(tmp_path) == ["requeue 12"] * 3
    run(script, "rte", CODE="0")
    assert "failure 1: requeued" in run(script, "rte", CODE="1")[1]


@both
def test_a_warning_is_passed_on_and_the_job_requeued(start: Start, tmp_path: Path, script: str) -> None:
    process = start(script, "rte", CODE="wait")
    wait_until((tmp_path / "waits").exists)
    process.send_signal(signal.SIGUSR2)
    said, _ = process.communicate()
    assert process.returncode == 75
    assert said.index("asked to stop") < said.index("stopped on request: requeued")
    assert asked(tmp_path) == ["requeue 12"]


@both
def test_a_script_without_arguments_says_what_it_wants(run: Run, tmp_path: Path, script: str) -> None:
    code, said = run(script)
    assert code == 2
    assert said.startswith("give a ")
    assert not (tmp_path / "srun").exists()


@both
def test_a_scripts_folder_may_have_any_name(run: Run, tmp_path: Path, script: str) -> None:
    folder = tmp_path / "my  scripts [1]"
    shutil.copytree(ROOT / "slurm", folder)
    words = ["rte", "--adapter.init_text", "a  b/c\nd", "*"]
    code, said = run(script, *words, COMMAND=" ".join([str(folder / script), *words]))
    assert code == 0, said
    # an argument to a line, and this one has two
    assert (tmp_path / "srun").read_text().endswith("\nrte\n--adapter.init_text\na  b/c\nd\n*\n")


@both
def test_a_script_alone_says_what_it_lacks(run: Run, tmp_path: Path, script: str) -> None:
    code, said = run(script, "rte", COMMAND=f"{tmp_path / script} rte")
    assert code == 2
    assert f"there is no {tmp_path}/job.sh: submit slurm/{script} by its path" in said
    assert not (tmp_path / "srun").exists()


@both
def test_the_users_setup_is_sourced(run: Run, tmp_path: Path, script: str) -> None:
    (tmp_path / "setup").write_text("export NCCL_SOCKET_IFNAME=ib0\n")
    assert run(script, "rte", GPC_DIST_SETUP=str(tmp_path / "setup"))[0] == 0
    assert environment(tmp_path)["NCCL_SOCKET_IFNAME"] == "ib0"
