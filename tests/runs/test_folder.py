"""Files that a crash cannot leave half written."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gpc_dist import files
from gpc_dist.errors import MachineError, UserError
from gpc_dist.runs.folder import RunFolder
from gpc_dist.runs.metrics import MetricLog, read_metrics


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def test_write_replaces_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "facts.json"
    files.write_json(path, {"a": 1})
    files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 2}
    assert os.listdir(path.parent) == ["facts.json"]


def test_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    files.write_json(path, {"a": 1})

    def disk_full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="no space"):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["result.json"]


def test_json_files_hold_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "result.json", {"loss": float("nan")})


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_broken_json_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"facts\.json.*restore or remove it"):
        files.read_json(path)


def test_log_has_one_json_object_per_line(tmp_path: Path) -> None:
    with MetricLog(tmp_path / "metrics.jsonl") as log:
        log.append(1, {"train/loss": np.float32(0.5), "tokens": 7}, time_s=100.0)
        log.append(2, {"train/loss": float("inf"), "val/f1": float("nan")}, time_s=101.0)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "time_s": 100.0, "train/loss": 0.5, "tokens": 7},
        {"step": 2, "time_s": 101.0, "train/loss": None, "val/f1": None},
    ]


def test_log_keeps_its_own_names(tmp_path: Path) -> None:
    with MetricLog(tmp_path / "m") as log, pytest.raises(ValueError, match="step"):
        log.append(1, {"step": 2.0})


def test_torn_line_is_not_read_and_removed_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricLog(path) as log:
        log.append(1, {"loss": 1.0})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    assert steps(path) == [1]
    with MetricLog(path) as log:
        log.append(2, {"loss": 0.5})
    assert steps(path) == [1, 2]


def test_lines_of_zeros_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"\0" * 64 + b'\n\xff\xfe\n[3]\n{"step": 2}\n')
    assert steps(path) == [1, 2]


def test_truncate_drops_later_steps_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricLog(path) as log:
        for step in (10, 20, 20, 30):
            log.append(step, {"loss": float("nan")})
    with path.open("ab") as file:
        file.write(b'{"step": 4')
    with MetricLog(path) as log:
        log.truncate_after(20)
        log.append(21, {"loss": 0.0})
    assert steps(path) == [10, 20, 20, 21]


def test_a_line_of_which_the_disk_takes_a_part_is_written_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MetricLog(tmp_path / "m.jsonl") as log:
        file = log._file
        monkeypatch.setattr(log, "_file", SimpleNamespace(write=lambda left: file.write(left[:7])))
        log.append(1, {"a": 1})
        log.append(2, {"a": 2})
        monkeypatch.undo()
    assert [line["step"] for line in read_metrics(tmp_path / "m.jsonl")] == [1, 2]


def test_a_line_is_in_the_file_when_it_has_been_written(tmp_path: Path) -> None:
    with MetricLog(tmp_path / "metrics.jsonl") as log:
        for step in (1, 2, 3):
            log.append(step, {"loss": 1.0})
            assert steps(tmp_path / "metrics.jsonl") == list(range(1, step + 1))


@pytest.mark.parametrize("cut", [1, 10, -1])
def test_a_line_is_read_once_it_is_whole(tmp_path: Path, cut: int) -> None:
    path, first, second = tmp_path / "metrics.jsonl", b'{"step": 1}\n', b'{"step": 2, "loss": 1.0}\n'
    path.write_bytes(first + second[:cut])
    assert files.read_lines(path) == ([{"step": 1}], len(first))
    assert files.read_lines(path, len(first)) == ([], len(first))
    path.write_bytes(first + second)
    assert files.read_lines(path, len(first)) == ([{"step": 2, "loss": 1.0}], len(first + second))


def test_lines_are_whole_while_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    values = {f"val/{'x' * 200}/{i}": 1.0 for i in range(100)}  # more than any buffer holds
    done = threading.Event()

    def write() -> None:
        try:
            with MetricLog(path) as log:
                for step in range(200):
                    log.append(step, values)
        finally:
            done.set()

    thread = threading.Thread(target=write)
    thread.start()
    offset, seen, ended = 0, [], False
    while not ended:
        ended = done.is_set()  # before the read, which then is the last one
        lines, offset = files.read_lines(path, offset)
        seen += lines
    thread.join()
    assert [line["step"] for line in seen] == list(range(200))
    assert all(len(line) == 102 for line in seen)


def test_status_round_trip(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.write_status("running")
    started = run.read_status()
    run.write_status("stopped", "SIGUSR2")
    status = run.read_status()
    assert (status.state, status.reason, status.pid) == ("stopped", "SIGUSR2", os.getpid())
    assert status.started_s == started.started_s <= status.updated_s


def test_killed_run_ends_at_its_last_sign_of_life(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.write_status("running")
    os.utime(run.status, (1000.0, 1000.0))
    run.mark_killed("lost")
    status = run.read_status()
    assert (status.state, status.reason, status.updated_s) == ("killed", "lost", 1000.0)


def test_start_over_forgets_the_earlier_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.write_status("running")
    with MetricLog(run.metrics) as log, MetricLog(run.host_telemetry("n1")) as telemetry:
        log.append(1, {"loss": 1.0})
        telemetry.append(0, {"cpu/util_pct": 1.0})
    files.write_json(run.tracking, {"run_id": "1"})
    files.write_text(run.checkpoints / "step-1", "")
    run.start_over()
    assert {path.name for path in run.path.iterdir()} == {".tracking.lock", "checkpoints"}


def test_start_over_waits_for_nobody(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with run.hold_tracking(), pytest.raises(UserError, match="being recorded"):
        RunFolder(run.path).start_over()
    run.start_over()


def test_who_holds_a_folder_removes_what_cut_off_writes_left(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.write_status("running")
    left = folder.path / f".status.json.{'ab' * 16}"
    others = [folder.path / name for name in (f".tracking.json.{'ab' * 16}", ".status.json.mine")]
    for file in (left, *others):
        file.touch()
    with folder.hold():
        assert not left.exists()
        assert all(file.exists() for file in others)


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_folder_that_is_moved_is_missed(tmp_path: Path, comes_back: bool) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.hold():
        folder.check_present()
        folder.path.rename(tmp_path / "moved")
        if comes_back:
            folder.path.mkdir()  # as a writer does that finds none
        with pytest.raises(
            MachineError, match="was removed or moved while the run wrote there: move it back"
        ):
            folder.check_present()
        if comes_back:
            folder.path.rmdir()
        (tmp_path / "moved").rename(folder.path)
        folder.check_present()


def test_folder_without_configuration_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not the folder of a run: it has no config\.yaml"):
        RunFolder(tmp_path).read_config()


def test_a_start_that_ended_within_its_first_write_left_no_strangers_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    left = folder.path / f".status.json.{'ab' * 16}"
    left.touch()
    with folder.hold():
        assert not left.exists()
    (folder.path / f".thesis.txt.{'ab' * 16}").touch()
    with pytest.raises(UserError, match="is not the folder of a run"):
        folder.check_own()
