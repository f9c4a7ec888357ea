"""What is there after a power cut, of the program's own ways to write."""

from __future__ import annotations

import os
from pathlib import Path

from gpc_dist import files
from gpc_dist.runs.metrics import MetricLog, read_metrics
from tests.faults.disk import Disk
from tests.processes import start_call


def write_and_cut(folder: Path) -> None:
    """As a process whose machine loses its power."""
    root = folder / "disk"
    root.mkdir()
    disk = Disk(root, folder / "aside")
    disk.watch()
    files.write_text(root / "runs" / "a" / "config.yaml", "old")
    files.write_text(root / "runs" / "a" / "config.yaml", "new")
    with files.new_folder(root / "adapter", ["card"]) as new:
        (new / "card").write_text("whole")
    log = MetricLog(root / "runs" / "a" / "metrics.jsonl")
    log.append(1, {})
    log.sync()
    log.append(2, {})
    (root / "runs" / "plain").mkdir()
    (root / "runs" / "unsynced").write_text("lost")
    os.rename(root / "runs" / "unsynced", root / "runs" / "renamed")
    disk.cut()


def test_what_is_written_by_the_program_survives_and_nothing_else(tmp_path: Path) -> None:
    done = start_call(write_and_cut, tmp_path)
    assert done.wait() == 0, done.stderr
    run = tmp_path / "disk" / "runs" / "a"
    assert (run / "config.yaml").read_text() == "new"
    assert (tmp_path / "disk" / "adapter" / "card").read_text() == "whole"
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1]
    assert sorted(path.name for path in run.parent.iterdir()) == ["a", "unsynced"]
    assert (run.parent / "unsynced").read_text() == ""
