"""The README's picture, and the figures that stand under it."""

from __future__ import annotations

import json
import runpy
import statistics

import pytest

from tests.conftest import ROOT

REPORT = json.loads((ROOT / "docs" / "studies" / "five-tasks" / "report.json").read_text())


@pytest.mark.slow
def test_it_is_drawn_from_what_was_measured() -> None:
    picture = runpy.run_path(str(ROOT / "benchmarks" / "picture.py"))
    speed, search, methods = picture["draw"](REPORT).axes
    shown = [text.get_text() for axes in (speed, search, methods) for text in axes.texts]
    assert {"24,827", "77,317", "352 s", "107 s"} <= set(shown)
    means = [task["methods"]["gpc"]["mean"] for task in REPORT["tasks"].values() if task["learnt"]]
    plain = [task["methods"]["prompt-tuning"]["mean"] for task in REPORT["tasks"].values() if task["learnt"]]
    assert f"{100 * (statistics.fmean(means) - statistics.fmean(plain)):+.1f}" in shown
    assert [label.get_text() for label in methods.get_yticklabels()][-1] == "mean"


def test_the_figures_under_it_are_those_of_the_files() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    packed = json.loads((ROOT / "benchmarks" / "packed_search.json").read_text())["results"]
    (alone,) = (each["sides"]["one trial"]["wall_s"] for each in packed if each["batch_size"] == 2)
    assert f"one of eight trials alone takes {alone:.0f} s" in readme
    found = REPORT["means"]["gpc"]["difference"]
    low, high = (100 * end for end in found["interval"])
    assert (
        f"{100 * found['mean']:.1f} points above prompt tuning in the mean (95 % interval {low:.1f} to {high:.1f})"
        in readme
    )
