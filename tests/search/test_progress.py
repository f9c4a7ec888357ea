"""What a search prints while it runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gpc_dist.search import progress
from gpc_dist.search.progress import SearchProgress, fit


class Trial(SimpleNamespace):
    def __str__(self) -> str:
        return f"{self.number:03d}"


def trial(number: int, status: str, values: list[float], **settings: Any) -> Trial:
    found = {"val/loss": {"min": min(values), "max": max(values)}} if values else {}
    return Trial(
        number=number,
        status=status,
        metric_analysis=found,
        last_result={"step": 10 * len(values)} if values else {},
        settings=settings,
    )


def reporter(total: int, mode: str = "min") -> SearchProgress:
    return SearchProgress(total, "val/loss", mode, lambda one: one.settings)


def test_the_line_and_the_table_speak_of_the_same_values(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "100")
    shown = reporter(total=8)
    trials = [
        trial(0, "TERMINATED", [0.9, 0.4, 0.6], seed=0, **{"train.lr": 0.0123456}),
        trial(1, "RUNNING", [0.7], seed=1, **{"train.lr": 0.1, "adapter.cell": "gated"}),
        trial(2, "ERROR", [], seed=0),
        trial(3, "PENDING", [], seed=1),
    ]
    assert not shown.should_report(trials)
    assert shown.should_report(trials, done=True)
    shown.report(trials, False)
    now[0] = 700.0
    assert shown.should_report(trials)
    trials[1].status = "TERMINATED"
    shown.report(trials, False)
    first, _, _, _, _, line, *table = capsys.readouterr().out.splitlines()
    assert first == "1 of 8 trials ended, 1 run, 1 failed; best loss 0.4000 by 000; 0 s"
    # one trial in ten minutes, five to go
    assert line == "2 of 8 trials ended, 0 run, 1 failed; best loss 0.4000 by 000; 10 min, about 50 min left"
    assert [row.split() for row in table] == [
        ["trial", "loss", "step", "state", "seed", "train.lr", "adapter.cell"],
        ["-------", "------", "------", "-------", "------", "----------", "--------------"],
        ["000", "0.4000", "30", "ended", "0", "0.0123"],
        ["001", "0.7000", "10", "ended", "1", "0.1", "gated"],
    ]


def test_more_may_be_better(capsys: pytest.CaptureFixture[str]) -> None:
    reporter(2, "max").report([trial(0, "RUNNING", [0.2, 0.3]), trial(1, "RUNNING", [0.9, 0.1])], False)
    assert "best loss 0.9000 by 001" in capsys.readouterr().out


@pytest.mark.parametrize(("width", "shown"), [(200, 4), (40, 3), (20, 2), (1, 1)])
def test_a_table_fits_its_terminal(width: int, shown: int) -> None:
    columns = ["trial", "accuracy", "adapter.cell", "adapter.prompt_tokens"]
    table = fit([dict.fromkeys(columns, "1")], width).splitlines()
    assert table[0].split() == columns[:shown]
    if shown < 4:
        assert table[-1] == f"(no room for {', '.join(columns[shown:])})"
    assert width == 1 or max(map(len, table[:3])) <= width


def test_durations_read_well() -> None:
    assert [progress._duration(s) for s in (4, 99, 600, 7300, 100_000)] == [
        "4 s",
        "99 s",
        "10 min",
        "2 h 02 min",
        "27 h 47 min",
    ]
