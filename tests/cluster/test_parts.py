"""The parts of the Slurm code that need no cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpc_dist.cluster import job_record, jobs, members, slurm
from gpc_dist.cluster.resources import Resources
from gpc_dist.errors import EXIT_USAGE, UserError
from gpc_dist.search import space, spec
from tests.conftest import gpc


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:30:00", 5400),
        ("2-12", 216000),
        ("2-12:30", 217800),
        ("1-00:00:00", 86400),
        ("infinite", None),
        ("UNLIMITED", None),
    ],
)
def test_time_limits(limit: str, expected: int | None) -> None:
    assert slurm.seconds(limit) == expected


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("(null)", (0, "")),
        ("gpu:2", (2, "")),
        ("gpu:a100:8(S:0-1),lustre:1", (8, "a100")),
        ("gpu:a100:4,gpu:v100:2", (6, "a100")),
        ("gpumem:80,gpu:h100:8(S:0-7)", (8, "h100")),
    ],
)
def test_generic_resources(gres: str, expected: tuple[int, str]) -> None:
    assert slurm._gpus(gres) == expected


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a program in the place of one of Slurm's, which prints this."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def put(name: str, text: str) -> None:
        (tmp_path / f"{name}.txt").write_text(text)
        (tmp_path / name).write_text(f"#!/bin/sh\ncat '{tmp_path}/{name}.txt'\n")
        (tmp_path / name).chmod(0o755)

    return put


def test_a_reason_may_be_any_text(says: Callable[[str, str], None]) -> None:
    reason = "burst_buffer/lua: no room: pool a|b|c"
    says(
        "squeue",
        f"7|PENDING|0:00||main|{reason}\nand a line of its own\n"
        "8_1|RUNNING|1-02:03:04|node[01-02]|main|None\n9|RUNNING|0:01|node03|main|None\n",
    )
    found = slurm.jobs(["7", "8_1"])
    assert found == {
        "7": slurm.Job("7", "PENDING", "0:00", "", "main", reason),
        "8_1": slurm.Job("8_1", "RUNNING", "1-02:03:04", "node[01-02]", "main", "None"),
    }


def test_nodes_of_a_partition_may_differ(says: Callable[[str, str], None]) -> None:
    says(
        "sinfo",
        "main*|up|2-00:00:00|3|16+|64000+|gpu:a100:4\nmain*|up|2-00:00:00|1|64|128000|gpu:a100:8(S:0-1),any|thing:1\n"
        "old|down|infinite|2|8|32000|(null)\n",
    )
    assert slurm.partitions() == [
        slurm.Partition("main", True, True, 4, 172800, 64, 128000, 8, "a100"),
        slurm.Partition("old", False, False, 2, None, 8, 32000, 0, ""),
    ]


def test_options_of_sbatch() -> None:
    asked = Resources(
        nodes=2, gpus_per_node=8, cpus_per_rank=6, dependency="afterok:7", others=("--exclusive",)
    )
    assert asked.options() == [
        *("--nodes=2", "--gpus-per-node=8", "--cpus-per-gpu=6", "--dependency=afterok:7"),
        *("--kill-on-invalid-dep=yes", "--exclusive"),
    ]
    asked = Resources(ranks_per_node=4, cpus_per_rank=2, time="30")
    assert asked.options() == ["--nodes=1", "--ntasks-per-node=4", "--mincpus=8", "--time=30"]


@pytest.mark.parametrize(("text", "seeds"), [("0-3", [0, 1, 2, 3]), ("7", [7]), ("1,5,8-9", [1, 5, 8, 9])])
def test_seeds(text: str, seeds: list[int]) -> None:
    found = members.seeds("rte", {"data.path": "demo"}, text)
    assert [member.config.run.seed for member in found] == seeds
    assert [str(member.config.run.folder) for member in found] == [f"runs/rte-seed-{s}" for s in seeds]
    assert {member.config.tracking.group for member in found} == {"rte"}


def test_lines_of_settings(tmp_path: Path) -> None:
    file = tmp_path / "array.txt"
    text = """# two runs
--train.lr 1e-3 --adapter.prompt_text "Is ticket #12 the customer's?"

--data.path tickets#2 --run.name=001
"""
    file.write_text(text, encoding="utf-8-sig")
    first, second = (member.config for member in members.lines("rte", {}, file))
    assert (first.train.lr, first.adapter.prompt_text) == (1e-3, "Is ticket #12 the customer's?")
    assert (second.data.path, second.run.name, second.tracking.group) == ("tickets#2", "001-1", "001")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"--train.lr 1\n--run.name customer's",
            "line 2 of .*: No closing quotation; write it as in a shell",
        ),
        (b"--train.lr 1\n0.5", "line 2 of .*: unexpected argument '0.5'"),
        (b"--run.name caf\xe9", "is not UTF-8 text"),
        (b"# nothing", "has no settings"),
    ],
)
def test_lines_that_are_no_settings_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "array.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        members.lines("rte", {}, tmp_path / "array.txt")


def test_a_search_is_submitted_as_it_is(tmp_path: Path) -> None:
    """What is kept loads as the same search, whatever becomes of the recipe that it was made of."""
    asked = spec.load("cb-asha", {"dir": str(tmp_path / "here"), "trials": "3"})
    (found,) = members.search(asked)
    for name, text in found.kept.items():
        (tmp_path / name).write_text(text)
    kept = spec.load(str(tmp_path / job_record.SEARCH))
    same = {"recipe": asked.recipe, "dir": asked.dir}
    assert kept.model_copy(update=same) == asked
    assert Path(kept.recipe) == tmp_path / job_record.RECIPE
    assert space.base_config(kept) == space.base_config(asked)


@pytest.mark.parametrize("text", ["", "a", "1,1", "3-1", "-1", "1,"])
def test_no_list_of_seeds(text: str) -> None:
    with pytest.raises(UserError, match="--seeds"):
        members.seeds("rte", {}, text)


def test_jobs_of_all_that_lies_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a shell's `runs/*` gives it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text("{}")
    (tmp_path / "run" / "facts.json").write_text('{"slurm_job_id": "7"}')
    (tmp_path / "mlflow.db").touch()
    monkeypatch.setattr(slurm, "jobs", lambda numbers: {})
    assert gpc("jobs", *sorted(tmp_path.iterdir())) == 0
    shown, said = capsys.readouterr()
    assert shown.splitlines()[2].split()[:2] == ["run", "7"]
    assert f"left out: {tmp_path / 'mlflow.db'} is not a folder" in said


def test_a_record_of_something_else_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "job").mkdir(parents=True)
    (tmp_path / "run" / "job" / "job.json").write_text('{"id": 3}')
    assert gpc("jobs", tmp_path) == EXIT_USAGE
    assert "job/job.json is not the record of a job: restore or remove it" in capsys.readouterr().err


def test_pace_counts_from_the_latest_start() -> None:
    now = time.time()
    lines = [
        {"time_s": now - 5000, "train/progress_pct": 10.0},
        {"time_s": now - 20, "train/progress_pct": 20.0},
        {"time_s": now, "train/progress_pct": 40.0},
        {"time_s": now, "val/accuracy": 0.5},
    ]
    progress, left_s = jobs.pace(lines, since_s=now - 100)
    assert progress == 40.0
    assert left_s == pytest.approx(60, abs=2)
    assert jobs.pace(lines[:2], since_s=now - 100) == (20.0, None)
    assert jobs.pace([], since_s=0) == (None, None)
