"""What a study's report says, from results made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpc_dist.reports import study as report
from gpc_dist.reports.blocks import Table, to_html, to_markdown
from gpc_dist.reports.plots import write_png
from gpc_dist.reports.study_plots import plots
from gpc_dist.reports.terminal import summary
from gpc_dist.runs.records import Record
from gpc_dist.study.results import (
    Difference,
    FinalRun,
    MethodResult,
    SearchSpread,
    StudyResult,
    TaskResult,
)
from gpc_dist.study.spec import StudySpec

MACHINE = {"cpu": "Some CPU", "cpus": 2, "versions": {"torch": "2.13.0"}}
METHODS = ("linear-probe", "prompt-tuning", "gpc", "fine-tuning")
STUDY = StudySpec.model_validate(
    {"tasks": {"easy": {}, "hard": {}}, "methods": {name: {} for name in METHODS}}
)


def method(*scores: float, **search: Any) -> MethodResult:
    record = Record("r", "t", 0, {}, "accuracy", {}, {}, {"val/accuracy": [(1, 0.5), (2, 0.6)]}, "finished")
    runs = [
        FinalRun(seed, score, 1 - score, score + 0.01, np.array([0]), 100, Path("adapter"), record)
        for seed, score in enumerate(scores, start=1)
    ]
    spread = {"values": [0.8, 0.7, 0.5], "failed": 1, "at_majority": 1, "cost_s": 12.0} | search
    return MethodResult(
        SearchSpread(**spread), {"train.lr": 0.1, "data.path": "/home/me/rte"} if scores else None, runs
    )


def task(name: str, means: dict[str, MethodResult], majority: float = 0.5) -> TaskResult:
    draws = np.linspace(-0.1, 0.3, 1001)
    known = {key: result for key, result in means.items() if result.runs and key != "prompt-tuning"}
    differences = {
        key: Difference(result.mean - means["prompt-tuning"].mean, draws)  # type: ignore[operator]
        for key, result in known.items()
    }
    floor, ceiling = means["linear-probe"].mean, means["fine-tuning"].mean
    return TaskResult(name, "accuracy", 100, majority, means, differences, floor, ceiling, False, [MACHINE])


EASY = task(
    "easy",
    {
        "linear-probe": method(0.60, 0.60, 0.60),
        "prompt-tuning": method(0.70, 0.72, 0.74),
        "gpc": method(0.75, 0.75, 0.78),
        "fine-tuning": method(0.80, 0.80, 0.80),
    },
)
HARD = task(
    "hard",
    {
        "linear-probe": method(0.50, 0.50, 0.50),
        "prompt-tuning": method(0.51, 0.51, 0.51),
        "gpc": method(0.49, 0.49, 0.49),
        "fine-tuning": method(0.52, 0.52, 0.52),
    },
)


def test_a_task_that_fine_tuning_does_not_learn_is_marked_and_left_out_of_means() -> None:
    found = StudyResult(STUDY, [EASY, HARD], [])
    assert (EASY.learnt, HARD.learnt) == (True, False)
    assert found.mean("gpc") == pytest.approx(0.76)
    text = to_markdown("x", report.tables(found))
    assert "Left out of means: hard." in text
    assert "hard (accuracy)*" in text


def test_without_the_ceiling_no_task_is_left_out() -> None:
    means = {key: value for key, value in HARD.methods.items() if key != "fine-tuning"}
    hard = TaskResult("hard", "accuracy", 100, 0.5, means, {}, 0.5, None, False, [])
    found = StudyResult(STUDY, [hard], [])
    assert hard.learnt is None
    assert found.mean("gpc") == pytest.approx(0.49)
    assert hard.covered("gpc") is None
    assert "fine-tuning was not run" in to_markdown("x", report.tables(found))


def test_the_share_of_the_distance() -> None:
    assert EASY.covered("gpc") == pytest.approx((0.76 - 0.60) / (0.80 - 0.60))
    assert EASY.covered("linear-probe") == 0
    assert EASY.covered("fine-tuning") == pytest.approx(1)
    error = TaskResult("e", "rmse", 9, 2.0, {"gpc": method(1.25, 1.25, 1.25)}, {}, 1.5, 1.0, False, [])
    assert error.covered("gpc") == pytest.approx(0.5)
    assert error.learnt
    backwards = TaskResult("b", "accuracy", 9, 0.5, {"gpc": method(0.7, 0.7, 0.7)}, {}, 0.8, 0.7, False, [])
    assert backwards.covered("gpc") is None


def test_a_method_that_failed_on_a_task_has_no_mean() -> None:
    other = task("other", {**EASY.methods, "gpc": method(failed=3, values=[], at_majority=0)})
    found = StudyResult(STUDY, [EASY, other], [])
    assert found.mean("gpc") is None
    assert found.mean_difference("gpc") is None
    assert found.mean("prompt-tuning") == pytest.approx(0.72)
    text = to_markdown("x", report.tables(found))
    line = next(line for line in text.splitlines() if line.startswith("| gpc"))
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["gpc", "0.7600 ± 0.0173", "failed", "-"]


def test_the_mean_difference_averages_the_draws_of_the_tasks() -> None:
    other = task("other", EASY.methods)
    flat = Difference(0.0, np.full(1001, 0.1))
    other = TaskResult("o", "accuracy", 9, 0.5, EASY.methods, {"gpc": flat}, 0.6, 0.8, False, [])
    found = StudyResult(STUDY, [EASY, other], []).mean_difference("gpc")
    assert found is not None
    assert found.mean == pytest.approx((0.76 - 0.72) / 2)
    assert found.interval == pytest.approx(((-0.09 + 0.1) / 2, (0.29 + 0.1) / 2))


def test_runs_that_failed_or_did_not_learn_are_seen() -> None:
    assert EASY.methods["gpc"].search.unstable == 0.5
    (found,) = [
        block
        for block in report.tables(StudyResult(STUDY, [EASY], []))
        if isinstance(block, Table) and block.title == "How the search went"
    ]
    assert found.lines[2] == ["gpc", "easy", "4", "0.8000", "0.7000", "0.5000", "1", "1", "50 %"]


def test_fewer_seeds_than_wanted_are_said() -> None:
    one = task("one", {**EASY.methods, "gpc": method(0.7)})
    assert "0.7000 (1 of 3 seeds)" in to_markdown("x", report.tables(StudyResult(STUDY, [one], [])))


@pytest.mark.slow
def test_the_page_and_the_plots(tmp_path: Path) -> None:
    found = StudyResult(STUDY, [EASY, HARD], ["later"])
    drawn = plots(found)
    assert [plot.name for plot in drawn] == ["scores", "differences", "spread", "curves"]
    page = to_html("<study>", [*report.tables(found), *drawn])
    assert "<h1>&lt;study&gt;</h1>" in page
    assert "Not measured yet, and in no figure below: later." in page
    assert page.count("<svg ") == 4
    assert "://" not in page.replace("http://www.w3.org", "")
    assert '<td class="n" data-n="0.76">0.7600 ± 0.0173</td>' in page
    assert "0.2400 ± 0.0173" in page  # the loss
    for plot in drawn:
        write_png(plot, tmp_path / f"{plot.name}.png")
        assert (tmp_path / f"{plot.name}.png").stat().st_size > 5000


def test_every_number_is_in_the_json() -> None:
    dumped = json.loads(json.dumps(report.dump(StudyResult(STUDY, [EASY], []))))
    gpc = dumped["tasks"]["easy"]["methods"]["gpc"]
    assert gpc["scores"] == {"1": 0.75, "2": 0.75, "3": 0.78}
    assert gpc["losses"] == pytest.approx({"1": 0.25, "2": 0.25, "3": 0.22})
    assert gpc["difference"]["mean"] == pytest.approx(0.04)
    assert dumped["means"]["gpc"]["score"] == pytest.approx(0.76)
    assert dumped["tasks"]["easy"]["machines"] == [MACHINE]


def test_the_report_names_the_machine_but_not_its_folders_and_servers() -> None:
    study = StudySpec.model_validate(
        STUDY.model_dump(mode="json")
        | {"dir": "/home/me/s", "data_root": "/home/me", "tracking": {"uri": "http://home:1"}}
    )
    found = StudyResult(study, [EASY], [])
    shown = to_markdown("x", report.tables(found))
    assert "Seconds of CPU ranks (2 x Some CPU, torch 2.13.0)" in shown
    assert "home" not in json.dumps(report.dump(found)) + shown


def test_a_study_without_a_search_says_so() -> None:
    unsearched = {"values": [], "failed": 0, "at_majority": 0, "cost_s": 0.0}
    easy = task(
        "easy",
        {
            name: method(*[run.score for run in held.runs], **unsearched)
            for name, held in EASY.methods.items()
        },
    )
    found = StudyResult(STUDY, [easy], [])
    assert not found.searched
    assert [plot.name for plot in plots(found)] == ["scores", "differences", "curves"]
    text = to_markdown("x", report.tables(found))
    assert "each with one configuration and 3 seeds" in text
    assert "How the search went" not in text
    assert "Chosen settings" not in text


def test_what_an_earlier_study_chose_is_said() -> None:
    rate = {"train.lr": 0.1}
    searched = {"space": {"train.lr": {"choice": [0.1, 0.2]}}}
    study = StudySpec.model_validate(
        STUDY.model_dump()
        | {
            "methods": {"linear-probe": {}, "prompt-tuning": searched, "gpc": searched, "fine-tuning": {}},
            "choices": {
                "easy": {"prompt-tuning": rate, "gpc": rate},
                "hard": {"prompt-tuning": rate, "other": rate},
                "elsewhere": {"gpc": rate},
            },
        }
    )
    text = to_markdown("x", report.tables(StudyResult(study, [EASY, HARD], [])))
    assert (
        "Chosen by an earlier study, and not searched again: prompt-tuning on easy, hard; gpc on easy. What"
        in text
    )
    assert "| gpc           | easy   | train.lr 0.1 |" in text


def test_the_summary_for_the_terminal() -> None:
    unlearnt = task("bad", {**EASY.methods, "gpc": method(0.4, 0.4, 0.4), "fine-tuning": method()})
    table, other, commands = summary(StudyResult(STUDY, [EASY, unlearnt], [])).split("\n\n")
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert "0.7600 ± 0.0173" in lines["gpc"]
    assert "+0.0400 [" in lines["gpc"]
    # the majority is at 0.5: a third, and all, of the way of the best one
    assert [lines[name].count("█") for name in ("linear-probe", "fine-tuning")] == [10, 30]
    assert "█" not in next(line for line in other.splitlines() if line.startswith("gpc"))
    assert "failed" in other
    assert [line.split()[0] for line in commands.splitlines()[2:]] == ["gpc-dist", "gpc-dist", "mlflow"]
