"""A job that is disturbed ends as the undisturbed one: the same adapter bit for bit, one run in MLflow."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import HELD, STEPS, same_run
from tests.holds import Hold
from tests.processes import command, wait_until
from tests.slurms import SCRIPT, SlurmLab, log_of, recorded_once

pytestmark = pytest.mark.slurm


ALONE = ("--engine.ranks", "1", "--tracking.enabled", "false")
"""Settings of a run of one rank."""


@pytest.fixture(scope="module", autouse=True)
def near_its_limit(
    slurm: SlurmLab, long_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """A job that stands still until Slurm warns it of its time limit, which takes a minute, and the folder of its run.

    Slurm looks at time limits twice a minute and warns up to a minute early: 35 to 60 s after the start at @60.
    """
    place = tmp_path_factory.mktemp("limit")
    hold = Hold(place / "run", HELD)
    job = start(slurm, long_recipe, place, "--nodes=1", "--time=2", "--signal=B:USR2@60", settings=ALONE)
    hold.wait(lambda: log_of(place))
    yield job, place
    slurm.call("scancel", job)


NODES = ("--nodes=2", "--ntasks-per-node=1")


def start(slurm: SlurmLab, recipe: Path, folder: Path, *options: str, settings: tuple[str, ...] = ()) -> str:
    """Submit a run over two nodes, if no others are given, as a user of plain sbatch does."""
    return slurm.submit(*NODES, *options, SCRIPT, recipe, "--run.dir", folder / "run", *settings, cwd=folder)


def ranks_of(folder: Path) -> list[psutil.Process]:
    """The training processes of a run, in the order of their ranks."""
    found = {}
    for process in psutil.process_iter(["cmdline", "environ"]):
        words, environment = process.info["cmdline"] or [], process.info["environ"] or {}
        if (
            {str(folder / "run"), "train"} <= set(words)
            and "SLURM_PROCID" in environment
            and "srun" not in words[0]
        ):
            found[int(environment["SLURM_PROCID"])] = process
    return [found[rank] for rank in sorted(found)]


def test_a_failure_that_stays_is_given_up(slurm: SlurmLab, long_recipe: Path, tmp_path: Path) -> None:
    # both fail together: Slurm would end one that is still starting, and its signal be the job's exit code
    (tmp_path / "broken").write_text(
        "#!/bin/bash\n"
        "trap '' TERM\n"
        'start="$0.${SLURM_RESTART_COUNT:-0}"\n'
        'touch "$start.$SLURM_PROCID"\n'
        "until [[ -e $start.0 && -e $start.1 ]]; do sleep 0.1; done\n"
        "exit 7\n"
    )
    (tmp_path / "broken").chmod(0o755)
    environment = f"--export=ALL,GPC_DIST_MAX_FAILURES=1,GPC_DIST_LAUNCHER={tmp_path / 'broken'}"
    found = slurm.wait(start(slurm, long_recipe, tmp_path, environment))
    assert (found["JobState"], found["Restarts"], found["ExitCode"]) == ("FAILED", "1", "7:0")
    assert "given up after 2 failures" in log_of(tmp_path)


def test_a_users_error_is_not_tried_again(slurm: SlurmLab, long_recipe: Path, tmp_path: Path) -> None:
    job = start(
        slurm, long_recipe, tmp_path, "--nodes=1", settings=(*ALONE, "--task.text", "[no_such_column]")
    )
    found = slurm.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0")
    assert "no_such_column" in log_of(tmp_path)
    assert "not requeued: it would fail again" in log_of(tmp_path)


def launcher(folder: Path, text: str) -> Path:
    """A program in the place of `gpc-dist`."""
    path = folder / "launcher"
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_task_of_an_array_restarts_alone(slurm: SlurmLab, tmp_path: Path) -> None:
    """One is stopped while another waits; the last one, whose id is the array's, while others run and have ended."""
    stand_in = launcher(
        tmp_path,
        "trap 'exit 75' USR2\n"
        "touch started-$SLURM_ARRAY_TASK_ID-${SLURM_RESTART_COUNT:-0}\n"
        "until [[ -e go-$SLURM_ARRAY_TASK_ID ]]; do sleep 0.1; done",
    )
    (tmp_path / "setup").write_text(
        "[[ $SLURM_ARRAY_TASK_ID != 0 || -n $SLURM_RESTART_COUNT ]] || touch sourcing\n"
        "while [[ -e sourcing && $SLURM_ARRAY_TASK_ID == 0 && -z $SLURM_RESTART_COUNT ]]; do sleep 0.1; done\n"
    )
    environment = f"--export=ALL,GPC_DIST_LAUNCHER={stand_in},GPC_DIST_SETUP={tmp_path / 'setup'}"
    job = slurm.submit("--array=0-2%2", environment, SCRIPT, "rte", cwd=tmp_path)

    def started(task: int, restarts: int) -> None:
        wait_until((tmp_path / f"started-{task}-{restarts}").exists, failed=lambda: log_of(tmp_path))

    def stop(task: int) -> None:
        slurm.call("scancel", "--batch", "--signal=USR2", f"{job}_{task}")

    def state(task: int) -> str:
        return slurm.job(f"{job}_{task}")["JobState"]

    def finish(task: int) -> None:
        (tmp_path / f"go-{task}").touch()
        assert slurm.wait(f"{job}_{task}")["JobState"] == "COMPLETED", log_of(tmp_path)

    started(1, 0)
    wait_until((tmp_path / "sourcing").exists, failed=lambda: log_of(tmp_path))
    assert state(2) == "PENDING"
    stop(0)  # its setup is being sourced
    started(2, 0)
    assert slurm.job(f"{job}_2")["JobId"] == job
    stop(2)
    started(0, 1)
    assert state(1) == "RUNNING"
    finish(0)
    started(2, 1)
    finish(1)
    stop(2)
    started(2, 2)
    finish(2)
    assert [slurm.job(f"{job}_{task}")["Restarts"] for task in range(3)] == ["1", "0", "2"]


def test_each_gpu_of_a_node_has_a_rank(slurm: SlurmLab, tmp_path: Path) -> None:
    """What a rank finds, of a job that gets nothing of the submitting shell's environment."""
    note = launcher(
        tmp_path, "echo $SLURM_PROCID $SLURM_NTASKS $SLURM_LOCALID $MASTER_ADDR $MINE > rank-$SLURM_PROCID"
    )
    scripts = tmp_path / "scripts"
    shutil.copytree(SCRIPT.parent, scripts)
    (scripts / "setup").write_text(f"export MINE=here\nGPC_DIST_LAUNCHER={note}\n")
    own = SCRIPT.read_text().replace(
        "set -uo pipefail", f"GPC_DIST_SETUP={scripts / 'setup'}\nset -uo pipefail"
    )
    (scripts / SCRIPT.name).write_text(own)
    options = ("--nodes=2", "--gpus-per-node=2", "--export=NONE")
    job = slurm.submit(*options, scripts / SCRIPT.name, "rte", cwd=tmp_path)
    assert slurm.wait(job)["JobState"] == "COMPLETED", log_of(tmp_path)
    found = {file.name: file.read_text().split() for file in tmp_path.glob("rank-*")}
    assert found == {f"rank-{rank}": [str(rank), "4", str(rank % 2), "node01", "here"] for rank in range(4)}


def test_time_limit(near_its_limit: tuple[str, Path], slurm: SlurmLab, long_recipe: Path) -> None:
    job, place = near_its_limit
    undisturbed = place / "undisturbed"
    done = command("train", long_recipe, *ALONE, "--run.dir", undisturbed)
    assert done.returncode == 0, done.stderr
    found = slurm.wait(job)
    assert found["JobState"] == "COMPLETED", log_of(place)
    assert int(found["Restarts"]) >= 1
    assert "stopped on request: requeued" in log_of(place)
    same_run(place / "run", undisturbed)


def test_a_job_disturbed_in_every_way_ends_as_the_undisturbed_one(
    slurm: SlurmLab,
    long_recipe: Path,
    undisturbed: Path,
    near_its_limit: tuple[str, Path],
    mlflow_store: Path,
    tmp_path: Path,
) -> None:
    """One disturbance after the other, each in a start of its own; between checkpoints, which are every 20 steps."""
    shutil.copy(mlflow_store, tmp_path / "mlflow.db")
    holds = [Hold(tmp_path / "run", step) for step in (24, 33, 44, 53)]
    job = start(slurm, long_recipe, tmp_path, "--partition=spot", settings=("--engine.timeout_s", "20"))
    said = [""]

    def held(number: int) -> str:
        """Wait for it; returns what the log says since the last time."""
        holds[number].wait(lambda: log_of(tmp_path))
        said.append(log_of(tmp_path))
        return said[-1].removeprefix(said[-2])

    held(0)
    ranks_of(tmp_path)[1].kill()  # for which rank 0 would wait for ever

    assert "failure 1: requeued" in held(1)
    os.kill(ranks_of(tmp_path)[1].pid, signal.SIGSTOP)
    holds[1].release()

    assert "did not answer for 20 s (engine.timeout_s)" in held(2)
    slurm.wait(near_its_limit[0])  # the other job is to have the nodes for itself
    slurm.wait(slurm.submit("--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true", cwd=tmp_path))

    assert "stopped by SIG" in held(3)
    slurm.down("--node", "node02")
    slurm.wait_for(job, lambda found: found["Restarts"] == "4")
    slurm.up()
    found = slurm.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "4"), log_of(tmp_path)
    same_run(tmp_path / "run", undisturbed)
    recorded_once(tmp_path / "run", STEPS)
