"""The parts of the Slurm code that need no cluster."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gpc_dist import config, deepspeed_file, files
from gpc_dist.cluster import job_record, jobs, members, options, slurm, snapshot, submit
from gpc_dist.cluster.resources import Resources
from gpc_dist.errors import EXIT_USAGE, UserError
from gpc_dist.search import space, spec
from gpc_dist.shipped import SHIPPED, shipped_folder
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


def test_the_size_of_an_array(says: Callable[[str, str], None]) -> None:
    says(
        "scontrol",
        "MailProg                = /bin/mail\nMaxArraySize            = 1001\nMaxJobCount  = 10000\n",
    )
    assert slurm.largest_array() == 1001


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


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("0-3", [0, 1, 2, 3]),
        ("7", [7]),
        ("1,5,8-9", [1, 5, 8, 9]),
        ("42,1337,20240", [42, 1337, 20240]),
        ("9,0-6:3", [9, 0, 3, 6]),
    ],
)
def test_seeds(text: str, seeds: list[int]) -> None:
    """A task's number is its place: Slurm allows numbers up to 1000."""
    found = members.seeds("rte", {"data.path": "demo"}, text)
    assert [member.task for member in found] == list(range(len(seeds)))
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


def test_members_of_an_array_may_have_folders_anywhere(tmp_path: Path) -> None:
    (tmp_path / "settings").write_text("--run.dir a\n--run.dir b/c\n--train.lr 0.1\n")
    found = members.lines("rte", {"data.path": "demo"}, tmp_path / "settings")
    assert [str(member.config.run.folder) for member in found] == ["a/0", "b/c/1", "runs/rte-2"]


def test_tasks_of_an_array_find_their_members(tmp_path: Path) -> None:
    def array(text: str) -> list[submit.Member]:
        found = members.seeds("rte", {"data.path": "demo", "run.dir": str(tmp_path)}, text)
        for member in found:
            member.folder.job.mkdir(parents=True, exist_ok=True)
        submit._link(found)
        return found

    first = array("42,1337")
    # submitted when task 1 of the other one may wait still
    second = array("42,7")
    for found in (first, second):
        for member in found:
            link = submit._links(found) / str(member.task)
            assert link.resolve() == member.folder.job
    assert submit._links(first) != submit._links(second)


SCRIPT = shipped_folder("slurm") / "train.sbatch"


def test_the_last_of_an_option_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options.asked(SCRIPT, []) == options.Asked("04:00:00", "B:USR2@180", None)
    monkeypatch.setenv("SBATCH_TIMELIMIT", "30")
    monkeypatch.setenv("SBATCH_ARRAY_INX", "0-9")
    given = ["--nodes=2", "--signal=B:USR2@60", "--exclusive", "--time-min=1"]
    assert options.asked(SCRIPT, given) == options.Asked("30", "B:USR2@60", "0-9")
    given += ["-t5", "--array", "0-3%2", "--signal", "USR2@20"]
    assert options.asked(SCRIPT, given) == options.Asked("5", "USR2@20", "0-3%2")
    with pytest.raises(UserError, match="--time: expected one argument"):
        options.asked(SCRIPT, ["--time"])


@pytest.mark.parametrize(
    ("time", "signal"), [("2", "B:USR2@180"), ("4", "B:USR2@180"), ("02:00:00", "B:USR2@7200"), ("2", "USR2")]
)
def test_a_warning_that_takes_all_of_the_time(time: str, signal: str) -> None:
    with pytest.raises(UserError, match=f"--time {time} .* leaves no time to train") as error:
        options.check_warning(options.Asked(time, signal, None))
    found = re.search(r"give --time (\d+) or more", str(error.value))
    assert found
    options.check_warning(options.Asked(found[1], signal, None))


@pytest.mark.parametrize(
    ("time", "signal"), [("5", "B:USR2@180"), ("2", "B:USR2@30"), ("0", "B:USR2@180"), ("infinite", "USR2@9")]
)
def test_a_warning_that_leaves_time(time: str, signal: str) -> None:
    options.check_warning(options.Asked(time, signal, None))


def test_an_array_keeps_its_throttle() -> None:
    def throttle(array: str | None, runs: int | None) -> str:
        return options.check_array(options.Asked(None, None, array), runs)

    assert [throttle(array, 4) for array in (None, "0-3", "0-3%2", "0,1,2,3%1")] == ["", "", "%2", "%1"]
    assert throttle(None, None) == ""
    for array in ("0-4%2", "0-3,7", "a"):
        with pytest.raises(UserError, match="is not for 4 runs: give --sbatch=--array=0-3"):
            throttle(array, 4)
    with pytest.raises(
        UserError, match=r"\(--array=0-3\) would run every task in the same folder: give --seeds"
    ):
        throttle("0-3", None)


@pytest.fixture
def users_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DeepSpeed JSON in the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(shipped_folder("ds_configs") / "zero0.json", "mine.json")
    return tmp_path / "mine.json"


def test_a_deepspeed_file_is_kept(users_file: Path) -> None:
    (found,) = members.single("rte", {"data.path": "demo", "engine.ds_config": "mine.json"})
    text = users_file.read_text()
    assert found.kept["ds_configs/mine.json"] == text
    for name, kept in found.kept.items():
        files.write_text(found.folder.job / name, kept)
    users_file.unlink()
    engine = config.load(str(found.folder.job / job_record.RECIPE)).engine
    assert engine.ds_config == str(found.folder.job / "ds_configs" / "mine.json")
    assert deepspeed_file.read(engine.ds_config) == json.loads(text)
    (plain,) = members.single("rte", {"data.path": "demo", "engine.ds_config": "zero0"})
    assert plain.kept.keys() == {job_record.RECIPE}
    for wrong in ("missing.json", "broken.json"):
        Path("broken.json").write_text("{")
        with pytest.raises(UserError, match=wrong):
            members.single("rte", {"data.path": "demo", "engine.ds_config": wrong})


def test_a_search_keeps_every_deepspeed_file_that_it_may_take(users_file: Path) -> None:
    Path("elsewhere").mkdir()
    Path("elsewhere", "mine.json").write_text(users_file.read_text() + "\n")
    Path("recipe.yaml").write_text(
        f"engine: {{ds_config: {users_file}}}\ndata: {{path: demo}}\ntask: {{name: rte}}\n"
    )
    given = {
        "dir": "here",
        "recipe": "recipe.yaml",
        "space.engine.ds_config": "[mine.json, elsewhere/mine.json, zero0]",
    }
    (found,) = members.search(spec.load("cb-asha", given))
    job = Path("here", "job").absolute()
    kept = yaml.safe_load(found.kept[job_record.SEARCH])
    values = [str(job / "ds_configs" / name) for name in ("mine.json", "other-mine.json")]
    assert kept["space"]["engine.ds_config"] == {"choice": [*values, "zero0"]}
    assert yaml.safe_load(found.kept[job_record.RECIPE])["engine"]["ds_config"] == values[0]
    assert {name for name in found.kept if name.endswith(".json")} == {
        "ds_configs/mine.json",
        "ds_configs/other-mine.json",
    }


def test_a_copy_of_the_program_runs_alone(tmp_path: Path) -> None:
    copy = snapshot.copy_program(tmp_path)
    assert snapshot.copy_program(tmp_path) == copy
    assert [path.name for path in tmp_path.iterdir()] == [copy.name]
    asked = "import gpc_dist; from gpc_dist.shipped import *; print(gpc_dist.__file__, *map(shipped_folder, SHIPPED))"
    job = {"PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"}  # as job.sh sets it
    done = subprocess.run([sys.executable, "-c", asked], env=job, capture_output=True, text=True, check=True)
    places = done.stdout.split()
    assert len(places) == 1 + len(SHIPPED)
    assert all(place.startswith(str(copy)) for place in places)
    for name in ("train.sbatch", "tune.sbatch", "job.sh"):
        assert (copy / name).read_bytes() == SCRIPT.with_name(name).read_bytes()


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
    assert "job/job.json: job_id: field required: restore or remove it" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["--me", "-u root", "7;reboot", "7\n8", "\u0661", "", 7, ["7"]])
def test_a_file_names_a_job_and_no_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: object
) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm, "call", lambda *words: calls.append(words) or "")
    record = {"log": "", "submitted_s": 2e9, "command": [], "sbatch": [], "code": {}}
    submitted, started = tmp_path / "submitted", tmp_path / "started"
    files.write_json(submitted / "job/job.json", record | {"job_id": number})
    files.write_json(started / "status.json", {"state": "running"})
    files.write_json(started / "facts.json", {"slurm_job_id": number})
    for folder, file in ((submitted, "job/job.json"), (started, "facts.json")):
        for command in ("cancel", "jobs"):
            assert gpc(command, folder) == EXIT_USAGE
            said = f"{folder / file} names the Slurm job"
            if folder == submitted and not isinstance(number, str):
                said = f"{folder / file}: job_id: input should be a valid string"
            assert said in capsys.readouterr().err
    assert calls == []
    files.write_json(started / "facts.json", {"slurm_array_job_id": "5", "slurm_array_task_id": "0 --me"})
    assert gpc("cancel", started) == EXIT_USAGE
    files.write_json(started / "facts.json", {"slurm_array_job_id": "5", "slurm_array_task_id": "0"})
    assert gpc("cancel", started) == 0
    assert calls == [("scancel", "5_0")]


def test_a_list_of_numbers_has_a_limit() -> None:
    assert slurm.numbers("0-999999") == list(range(10**6))
    for text in ("0-1000000", "0-999999,5", "0-99999999999", "1" * 19):
        assert slurm.numbers(text) is None


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
