"""A run's folder: nothing of the user's is touched there, and one process at a time works in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpc_dist.errors import EXIT_ENVIRONMENT, EXIT_USAGE
from gpc_dist.runs.folder import RunFolder, SearchFolder
from tests.conftest import gpc, losses
from tests.holds import Hold
from tests.processes import start, start_call, start_launcher, wait_until


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.yaml", "holds config.yaml, and is not the folder of a run"),
        ("adapter/notes.txt", "holds adapter, and is not the folder of a run"),
        ("checkpoints/step-00000004/model.pt", "holds checkpoints, and is not the folder of a run"),
        ("search.yaml", "is not the folder of a run (it has search.yaml)"),
    ],
)
def test_a_folder_of_the_users_is_refused_as_it_is(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, message: str
) -> None:
    project = tmp_path / "project"
    (project / file).parent.mkdir(parents=True)
    (project / file).write_text("mine")
    for more in ((), ("--train.resume", "false")):
        assert gpc("train", tiny_recipe, "--run.dir", project, *more) == EXIT_USAGE
        assert message in capsys.readouterr().err
        assert contents(project) == {file: b"mine"}


def test_what_the_user_put_into_a_run_stays(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the run's own files, among its checkpoints, and under names that look like theirs."""
    run = tmp_path / "run"
    train = ("train", tiny_recipe, "--run.dir", run, "--train.keep_last", 1)
    assert gpc(*train) == 0
    mine = [
        "notes.txt",
        "checkpoints/mine/model.pt",
        "checkpoints/step-best/COMPLETE",
        "checkpoints/step-00000001/a",
    ]
    for name in mine:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")
    assert gpc(*train, "--train.steps", 16) == 0
    assert gpc(*train, "--train.resume", "false") == 0
    found = contents(run)
    assert {name for name in found if found[name] == b"mine"} == set(mine)
    assert losses(run).keys() == set(range(1, 13))

    (run / "adapter" / "README.md").write_text("mine")
    capsys.readouterr()
    assert gpc(*train, "--train.steps", 16) == EXIT_USAGE
    assert f"{run / 'adapter'} holds README.md, which gpc-dist did not write" in capsys.readouterr().err
    assert contents(run)["adapter/README.md"] == b"mine"


def test_a_run_that_cannot_begin_replaces_nothing(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`train.resume: false` removes what is there, and only once the encoder and the start are known to be good."""
    run, other = tmp_path / "run", tmp_path / "other"
    train = ("train", tiny_recipe, "--run.dir", run, "--train.steps", 4)
    assert gpc(*train) == 0
    assert gpc("train", tiny_recipe, "--run.dir", other, "--train.steps", 4, "--run.seed", 5) == 0
    card = other / "adapter" / "adapter_config.json"
    card.write_text(card.read_text().replace('"layers": 4', '"layers": 2'))
    before = contents(run)
    for wrong, message in (
        (("--adapter.init_from", other / "adapter"), "layers 2"),
        (("--encoder.path", tmp_path / "none"), "none"),
    ):
        capsys.readouterr()
        assert gpc(*train, "--train.resume", "false", *wrong) == EXIT_USAGE
        assert message in capsys.readouterr().err
        assert contents(run) == before


def test_linked_folders_are_written_where_they_lead(tiny_recipe: Path, tmp_path: Path) -> None:
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    train = ("train", tiny_recipe, "--run.dir", run, "--train.keep_last", 1)
    assert gpc(*train, "--train.steps", 4) == 0
    for name in ("adapter", "checkpoints"):
        scratch.mkdir(exist_ok=True)
        (run / name).rename(scratch / name)
        (run / name).symlink_to(scratch / name)
    assert gpc(*train) == 0
    assert losses(run).keys() == set(range(1, 13))
    assert [path.name for path in (scratch / "checkpoints").iterdir() if path.name == "step-00000012"]
    assert gpc(*train, "--train.resume", "false", "--train.steps", 4) == 0
    assert (run / "adapter").is_symlink()
    assert (scratch / "adapter" / "adapter.safetensors").exists()


@pytest.mark.slow
def test_a_second_trainer_is_refused_and_told_by_whom(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    hold = Hold(run, 6)
    first = start("train", tiny_recipe, "--run.dir", run)
    hold.wait(lambda: first.stderr)
    for more in ((), ("--train.resume", "false")):
        assert gpc("train", tiny_recipe, "--run.dir", run, *more) == EXIT_ENVIRONMENT
        said = capsys.readouterr().err
        assert f"{run} is in use by process {first.pid} on {os.uname().nodename}: wait until it ends" in said
    hold.release()
    assert first.wait() == 0, first.stderr
    assert losses(run).keys() == set(range(1, 13))


def hold_for_ever(folder: Path) -> None:
    with RunFolder(folder).hold():
        (folder / "held").touch()
        signal.pause()


@pytest.mark.slow
def test_a_process_that_died_holds_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.write_status("running")
    holder = start_call(hold_for_ever, run.path)
    wait_until((run.path / "held").exists, failed=lambda: holder.stderr)
    with pytest.raises(Exception, match="is in use"), run.hold():
        pass
    holder.kill()
    holder.wait()
    with run.hold():
        pass


@pytest.mark.parametrize("missing", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_worked_on(
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    missing: int,
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(missing, os.strerror(missing))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert gpc("train", tiny_recipe, "--run.dir", tmp_path / "run") == 0
    assert f"{tmp_path / 'run'}: this file system has no locks ({os.strerror(missing)})" in caplog.text
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


def test_a_run_does_not_begin_in_a_search_nor_a_search_in_a_run(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert gpc("train", tiny_recipe, "--run.dir", run) == 0
    capsys.readouterr()
    with pytest.raises(
        Exception, match=r"is not the folder of a search \(it has config\.yaml\): give another --name"
    ):
        SearchFolder(run).check_own()


@pytest.mark.slow
def test_ranks_end_with_a_launcher_that_was_killed(tiny_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    hold = Hold(run, 3)
    launcher = start_launcher("train", tiny_recipe, "--run.dir", run, "--engine.ranks", 2)
    hold.wait(lambda: launcher.stderr)
    ranks = psutil.Process(launcher.pid).children()
    assert len(ranks) == 2
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(ranks)
    assert not alive
    hold.release()
    # nothing is left that would hold the folder
    assert gpc("train", tiny_recipe, "--run.dir", run) == 0
    assert losses(run).keys() == set(range(1, 13))
