"""Log lines: their form, how loud they are, and where those of a rank go."""

from __future__ import annotations

import faulthandler
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpc_dist import cli, logs

log = logging.getLogger("gpc_dist.somewhere")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    faulthandler.enable(sys.__stderr__)
    logs.configure(0)


@pytest.mark.parametrize(
    ("verbosity", "shown"), [(1, ["DEBUG", "INFO", "WARNING"]), (0, ["INFO", "WARNING"]), (-1, ["WARNING"])]
)
def test_a_line_has_time_rank_and_level(
    verbosity: int, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(verbosity)
    for level in (logging.DEBUG, logging.INFO, logging.WARNING):
        log.log(level, "step %d", 4)
    lines = capsys.readouterr().err.splitlines()
    found = [
        re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} rank 0 (\w+) step 4", line) for line in lines
    ]
    assert [match and match[1] for match in found] == shown


def test_a_rank_above_0_logs_everything_to_its_file_and_nothing_to_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    logs.configure(-1)
    logs.log_rank_to(tmp_path / "logs" / "rank-3.log")
    log.debug("gathering")
    assert (tmp_path / "logs" / "rank-3.log").read_text().endswith("rank 3 DEBUG gathering\n")
    assert capsys.readouterr().err == ""


def test_loudness_is_asked_for_on_the_command_line(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(tiny_recipe), "--train.steps", "2"]
    assert cli.main([*words, "--run.dir", str(tmp_path / "quiet"), "-q"]) == 0
    assert "step 2/2" not in capsys.readouterr().err
    assert cli.main([*words, "--run.dir", str(tmp_path / "plain")]) == 0
    assert re.search(r"rank 0 INFO step 2/2  loss ", capsys.readouterr().err)
    assert cli.main([*words, "--run.dir", str(tmp_path / "loud"), "-v"]) == 0
    assert "encoder in place after" in capsys.readouterr().err
