"""The batch scripts, with stand-ins for Slurm's programs: what they start, and what they ask of Slurm at its end.

That a scheduler does what it is asked is shown against a real one (`test_survival`, `test_tune`).
"""

from __future__ import annotations

import os
import re
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
[[ -z ${IDLE:-} ]] || touch "$GPC_DIST_IDLE"
printf '%s\\n' ${AWAY:-} > "$FAKES/away"
if [[ ${CODE:-0} == wait ]]; then
  trap 'exit 75' USR2
  touch "$FAKES/waits"
  while :; do sleep 0.02; done
fi
exit "${CODE:-0}"
"""
SCONTROL = """#!/bin/bash
if [[ -n ${HOLD:-} && ! -e $FAKES/released ]]; then
  touch "$FAKES/held"
  until [[ -e $FAKES/released ]]; do sleep 0.02; done
fi
away=$(head -n 1 "$FAKES/away" 2> /dev/null)
sed -i 1d "$FAKES/away" 2> /dev/null
if [[ $away == yes ]]; then
  echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
  exit 1
fi
case "$1 $2" in
  "show hostnames") printf 'node07\\nnode08\\n' ;;
  "show job")
    printf '%s\n' "JobId=$3 JobName=x" "   JobState=${STATE:-RUNNING} Reason=None Dependency=(null)" \
      "   Requeue=1 Restarts=${RESTARTS:-${SLURM_RESTART_COUNT:-0}} BatchFlag=1" \
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
            # Slurm ignores none; a shell that runs the tests in its background lets them ignore this one
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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


def test_the_ranks_of_each_start_have_a_secret(run: Run, tmp_path: Path) -> None:
    secrets = set()
    for _ in range(2):
        run("train.sbatch", "rte")
        secrets.add(environment(tmp_path)["GPC_DIST_SECRET"])
    assert len(secrets) == 2
    assert all(re.fullmatch("[0-9a-f]{64}", secret) for secret in secrets)
    assert not secrets & set((tmp_path / "srun").read_text().split())  # which everybody on the nodes sees


@both
def test_on_one_node_the_ranks_meet_at_the_loopback_interface(run: Run, tmp_path: Path, script: str) -> None:
    run(script, "rte", SLURM_JOB_NUM_NODES="1", SLURM_JOB_NODELIST="node07")
    assert environment(tmp_path)["MASTER_ADDR"] == "127.0.0.1"


@both
def test_no_folder_that_another_could_have_made_is_used(run: Run, tmp_path: Path, script: str) -> None:
    """Each process of the job looks for its own (`own_folders`)."""
    temporary = tmp_path / "local"
    planted = temporary / f"gpc-dist-{os.geteuid()}" / "inductor"
    planted.mkdir(parents=True)
    assert run(script, "rte", TMPDIR=str(temporary))[0] == 0
    assert not [value for value in environment(tmp_path).values() if value.startswith(f"{temporary}/")]
    assert list(temporary.rglob("*")) == [planted.parent, planted]


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
        (1, {"RESTARTS": "1"}, "JobState=RUNNING, requeued", False),  # on a node that Slurm had lost
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
def test_a_controller_that_is_away_at_the_start_is_waited_for(run: Run, tmp_path: Path, script: str) -> None:
    (tmp_path / "away").write_text("yes\n")
    code, said = run(script, "rte")
    assert code == 0, said
    assert (tmp_path / "srun").exists()


def test_a_controller_that_is_away_at_the_end_is_waited_for(run: Run, tmp_path: Path) -> None:
    """When it is asked for the job's state, and when it is asked to requeue it."""
    code, said = run("train.sbatch", "rte", CODE="1", AWAY="yes no yes")
    assert code == 1
    assert said.count("Slurm's controller does not answer: waiting for it") == 1
    assert "failure 1: requeued" in said
    assert asked(tmp_path) == ["requeue 12"]


def test_a_job_that_slurm_does_not_requeue_ends(run: Run, tmp_path: Path) -> None:
    (tmp_path / "programs" / "scontrol").write_text(
        SCONTROL.replace('*) echo "$@" >> "$FAKES/asked"', '*) echo "$@" >> "$FAKES/asked"; exit 1')
    )
    assert run("train.sbatch", "rte", CODE="75")[0] == 75
    assert asked(tmp_path) == ["requeue 12"] * 2


@both
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGINT])
def test_a_warning_is_passed_on_and_the_job_requeued(
    start: Start, tmp_path: Path, script: str, number: signal.Signals
) -> None:
    process = start(script, "rte", CODE="wait")
    wait_until((tmp_path / "waits").exists)
    process.send_signal(number)
    said, _ = process.communicate()
    assert process.returncode == 75
    assert said.index("asked to stop") < said.index("stopped on request: requeued")
    assert asked(tmp_path) == ["requeue 12"]


@both
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_a_stop_that_comes_first_of_all(
    start: Start, tmp_path: Path, script: str, number: signal.Signals
) -> None:
    """While the script still looks for what it shares with the other one."""
    process = start(script, "rte", HOLD="yes")
    wait_until((tmp_path / "held").exists)
    process.send_signal(number)
    (tmp_path / "released").touch()
    said, _ = process.communicate()
    assert process.returncode == 75, said
    assert "asked to stop" in said
    assert asked(tmp_path) == ["requeue 12"]
    assert not (tmp_path / "srun").exists()


@both
@pytest.mark.parametrize(
    ("number", "state", "requeued"),
    [
        (signal.SIGUSR2, "RUNNING", True),
        (signal.SIGTERM, "RUNNING", True),  # preempted, with a grace time
        (signal.SIGTERM, "CANCELLED", False),
    ],
)
def test_a_stop_while_the_users_setup_is_sourced(
    start: Start, tmp_path: Path, script: str, number: signal.Signals, state: str, requeued: bool
) -> None:
    setup = tmp_path / "setup"
    setup.write_text("touch $FAKES/sourcing\nwhile :; do sleep 0.02; done\n")
    process = start(script, "rte", GPC_DIST_SETUP=str(setup), STATE=state)
    wait_until((tmp_path / "sourcing").exists)
    process.send_signal(number)
    said, _ = process.communicate()
    assert process.returncode == 75, said
    assert "asked to stop" in said
    assert asked(tmp_path) == (["requeue 12"] if requeued else [])
    assert not (tmp_path / "srun").exists()


@both
def test_a_job_that_gets_nowhere_is_given_up(run: Run, tmp_path: Path, script: str) -> None:
    stopped = {"CODE": "75", "IDLE": "yes"}
    for number in (1, 2):
        said = run(script, "rte", **stopped)[1]
        assert f"failure {number}, stopped before it got anywhere: requeued" in said
    assert "stopped on request: requeued" in run(script, "rte", CODE="75")[1]  # it has got somewhere
    for number in (1, 2, 3):
        assert f"failure {number}, " in run(script, "rte", **stopped)[1]
    code, said = run(script, "rte", **stopped)
    assert code == 75
    assert "given up after 4 failures" in said
    assert "give it a longer --time, or a shorter warning" in said
    assert asked(tmp_path) == ["requeue 12"] * 6
    assert "failure 1, " in run(script, "rte", **stopped)[1]  # requeued by hand


def _no_folder(place: Path) -> Path:
    return place / "missing"


def _no_room(place: Path) -> Path:
    (place / ".gpc-dist-jobs").mkdir()
    (place / ".gpc-dist-jobs" / "12.starts").symlink_to("/dev/full")
    return place


def _not_writable(place: Path) -> Path:
    (place / ".gpc-dist-jobs").touch()
    return place


@both
@pytest.mark.parametrize("submit_folder", [_no_folder, _not_writable, _no_room])
def test_where_failures_cannot_be_counted_restarts_are(
    run: Run, tmp_path: Path, script: str, submit_folder: Callable[[Path], Path]
) -> None:
    place = {"SLURM_SUBMIT_DIR": str(submit_folder(tmp_path)), "TMPDIR": str(tmp_path / "local")}
    (tmp_path / "local").mkdir()

    def start_again(restarts: int, **given: str) -> str:
        return run(script, "rte", SLURM_RESTART_COUNT=str(restarts), **place, **given)[1]

    for restarts in (0, 1, 2):
        said = start_again(restarts, CODE="1")
        assert "restarts are counted in place of failures" in said
        assert f"failure {restarts + 1}: requeued" in said
    assert "given up after 4 failures" in start_again(3, CODE="1")
    assert "given up after 9 failures" in start_again(8, CODE="75", IDLE="yes")
    assert asked(tmp_path) == ["requeue 12"] * 3
    assert "not requeued: it would fail again" in start_again(0, CODE="2", REFUSAL="no such column")
    assert "stopped on request: requeued" in start_again(8, CODE="75")
    assert list((tmp_path / "local").iterdir()) == []


@both
def test_notes_that_are_lost_do_not_keep_a_job_alive(run: Run, tmp_path: Path, script: str) -> None:
    """The folder is another one on each node, or is emptied."""
    for restarts in range(4):
        shutil.rmtree(tmp_path / ".gpc-dist-jobs", ignore_errors=True)
        said = run(script, "rte", SLURM_RESTART_COUNT=str(restarts), CODE="1")[1]
    assert "given up after 4 failures" in said


@both
def test_starts_that_slurm_ended_are_no_failures(run: Run, tmp_path: Path, script: str) -> None:
    for restarts in range(5):
        run(script, "rte", SLURM_RESTART_COUNT=str(restarts), CODE="1", STATE="COMPLETING")
    assert "failure 1: requeued" in run(script, "rte", SLURM_RESTART_COUNT="5", CODE="1")[1]


@both
def test_the_step_gets_what_the_script_has(run: Run, tmp_path: Path, script: str) -> None:
    """sbatch leaves its --export for srun."""
    for value in ("NONE", "GPC_DIST_SETUP"):
        assert run(script, "rte", SLURM_EXPORT_ENV=value)[0] == 0
        assert "SLURM_EXPORT_ENV" not in environment(tmp_path)


@both
def test_a_copy_of_the_program_beside_the_script_is_run(run: Run, tmp_path: Path, script: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(ROOT / "slurm", folder)
    (folder / "gpc_dist").mkdir()
    for given, expected in (({}, str(folder)), ({"PYTHONPATH": "/mine"}, f"{folder}:/mine")):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("PYTHONPATH", raising=False)
            assert run(script, "rte", COMMAND=f"{folder / script} rte", **given)[0] == 0
        found = environment(tmp_path)
        assert (found["PYTHONPATH"], found["PYTHONSAFEPATH"]) == (expected, "1")


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
    # with a variable that is not set, as such files have, and names that a script might use
    (tmp_path / "setup").write_text(
        "export NCCL_SOCKET_IFNAME=ib0$NOT_SET job=mine folder=mine\nsay() { exit 9; }\n"
    )
    assert run(script, "rte", GPC_DIST_SETUP=str(tmp_path / "setup"))[0] == 0
    assert environment(tmp_path)["NCCL_SOCKET_IFNAME"] == "ib0"
