"""Whether a process is a rank: what `torchrun`, `srun`, containers and shells leave in its environment."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from gpc_dist import cli, logs
from gpc_dist.config import EngineConfig
from gpc_dist.distributed import launch, rendezvous
from gpc_dist.distributed.world import init_world
from gpc_dist.errors import EXIT_ENVIRONMENT, MachineError, UserError
from gpc_dist.search import node
from tests.processes import free_port, start, start_call, wait_until

STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}
INTERACTIVE = {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}


@pytest.fixture
def environment() -> Iterator[pytest.MonkeyPatch]:
    """Nothing of a rank or of Slurm in the environment, and as it was afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        before = dict(os.environ)
        for name in before:
            if (
                name.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_", "GPC_DIST_"))
                or name in launch._OF_A_RANK
            ):
                del os.environ[name]
        yield patch
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--local_rank=3", "train", "rte"], ["train", "rte"]),
        (["--local-rank=0", "train"], ["train"]),
        (["train", "--local_rank=3"], ["train", "--local_rank=3"]),
        (["--local_rank=x"], ["--local_rank=x"]),
        ([], []),
    ],
)
def test_the_word_that_the_deepspeed_launcher_adds(words: list[str], expected: list[str]) -> None:
    assert launch.without_local_rank(words) == expected


@pytest.mark.parametrize(
    ("given", "rank"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, ("1", "2")),
        (TORCHRUN, ("0", "1")),
        (STEP, ("1", "4")),
        # a step of fewer tasks than the job
        (STEP | {"SLURM_STEP_NUM_TASKS": "2"}, ("1", "2")),
        # its step before what a container left
        (STEP | {"RANK": "0", "WORLD_SIZE": "1"}, ("1", "4")),
    ],
)
def test_a_rank_is_told_by_its_environment(
    environment: pytest.MonkeyPatch, given: dict[str, str], rank: tuple[str, str]
) -> None:
    os.environ.update(given)
    assert launch.given_ranks()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == rank


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "3", "WORLD_SIZE": "1", "LOCAL_RANK": "3"},
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"LOCAL_RANK": "1"},
        # a batch script
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
        STEP | {"SLURM_STEP_ID": "4294967291"},
        # the shell of salloc, whose job has four tasks
        INTERACTIVE,
        INTERACTIVE | {"SLURM_STEP_NUM_TASKS": "1"},
        # shells that srun opened: for one task, and for the first of several
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        STEP | {"SLURM_PTY_PORT": "40000"},
    ],
)
def test_what_is_left_over_makes_no_rank(environment: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    os.environ.update(given)
    assert not launch.given_ranks()
    assert not os.environ.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}


def test_a_task_with_a_terminal_is_a_rank_if_srun_started_it(environment: pytest.MonkeyPatch) -> None:
    os.environ.update(STEP | {"SLURM_PTY_PORT": "40000"})
    environment.setattr(launch, "_parent", lambda: "slurmstepd")
    assert launch.given_ranks()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2 in the environment: unset them"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one in the environment is no number: unset it"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(
    environment: pytest.MonkeyPatch, given: dict[str, str], message: str
) -> None:
    os.environ.update(given)
    with pytest.raises(UserError, match=message):
        launch.given_ranks()


def test_it_is_said_what_was_taken_from_the_environment(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(0)
    os.environ.update({"RANK": "0", "WORLD_SIZE": "2"})
    assert launch.given_ranks()
    assert "rank 0 of 2, as RANK and WORLD_SIZE in the environment say" in capsys.readouterr().err
    os.environ["WORLD_SIZE"] = "1"
    assert not launch.given_ranks()
    assert "RANK=0 WORLD_SIZE=1 in the environment: not used" in capsys.readouterr().err


def test_a_shell_is_no_node_of_a_search(environment: pytest.MonkeyPatch) -> None:
    place = {"MASTER_ADDR": "node07", "MASTER_PORT": "20000"}
    os.environ.update(STEP | place)
    assert node.is_one()
    os.environ.update(INTERACTIVE)
    assert not node.is_one()


def test_all_nodes_of_a_search_have_a_folder_that_nobody_else_enters_at_one_path(
    environment: pytest.MonkeyPatch,
) -> None:
    os.environ.update(SLURM_JOB_ID=f"test{os.getpid()}", RAY_AUTH_TOKEN="known")
    with node._own_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with node._own_folder() as again:  # a node that is the same machine
            assert again == folder
        assert folder.exists()
        os.environ["RAY_AUTH_TOKEN"] = "another"
        with node._own_folder() as other:
            assert other != folder
        os.environ["RAY_AUTH_TOKEN"] = "known"
        folder.chmod(0o777)  # as if somebody else had made it
        with pytest.raises(MachineError, match=f"{folder}, for Ray's files, is not a folder of yours"):
            node._own_folder().__enter__()
    assert not folder.exists()


def test_a_command_without_ranks_takes_no_notice_of_them(
    environment: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ.update({"RANK": "1", "WORLD_SIZE": "2"})
    (tmp_path / "run").mkdir()
    (tmp_path / "file").touch()
    cli.main(["results", str(tmp_path / "run"), str(tmp_path / "file")])
    assert "file is not a folder" in capsys.readouterr().err
    assert "RANK" not in os.environ


def train_at_once(recipe: Path, folder: Path) -> int:
    rendezvous._PATIENCE_S = 0.1
    return cli.main(["train", str(recipe), "--run.dir", str(folder)])


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "missing"), [("0", "rank 1, 2"), ("2", "rank 0")])
def test_a_rank_that_waits_says_for_whom_and_where(
    tiny_recipe: Path, tmp_path: Path, environment: pytest.MonkeyPatch, rank: str, missing: str
) -> None:
    port = str(free_port())
    os.environ.update(RANK=rank, WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    process = start_call(train_at_once, tiny_recipe, tmp_path / "run")
    wait_until(lambda: "waits" in process.stderr or process.returncode is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert f"rank {rank} of 3 waits at 127.0.0.1:{port} for {missing}, at most 1800 s" in process.stderr


@pytest.mark.slow
def test_a_rank_that_nobody_joins_gives_up(environment: pytest.MonkeyPatch, tiny_recipe: Path) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    started = start("train", tiny_recipe, "--engine.timeout_s", 1)
    assert started.wait() == EXIT_ENVIRONMENT
    assert "rank 1 did not come within 1 s" in started.stderr
    assert "Traceback" not in started.stderr


@pytest.mark.slow
def test_a_containers_variables_change_nothing(tiny_recipe: Path, tmp_path: Path) -> None:
    left = {
        "RANK": "3",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "10.255.255.1",
        "MASTER_PORT": "1",
    }
    words = ("train", tiny_recipe, "--run.dir", tmp_path / "run", "--engine.zero_stage", 3)
    run = start(*words, **left)
    assert run.wait() == 0, run.stderr
    assert "step 12/12" in run.stderr


def test_signals_are_the_callers_again_when_its_ranks_have_ended() -> None:
    """A study starts ranks, and goes on."""
    before = [signal.getsignal(number) for number in launch.FORWARDED]
    assert launch.start_ranks(["true"], 1) == 0
    assert [signal.getsignal(number) for number in launch.FORWARDED] == before


def join_and_make_a_group() -> None:
    world = init_world(EngineConfig(device="cpu", zero_stage=3, timeout_s=7))
    made = dist.new_group([0])._get_backend(world.device)
    print(made.options._timeout.total_seconds())


def test_groups_that_libraries_make_do_not_wait_longer_for_a_rank_than_the_job() -> None:
    """DeepSpeed gives its own no timeout, and PyTorch's is half an hour."""
    done = start_call(join_and_make_a_group)
    assert done.wait() == 0, done.stderr
    assert done.stdout == "7.0\n"
