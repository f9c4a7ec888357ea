"""The README's picture, and the figures that stand under it."""

from __future__ import annotations

import json
import runpy

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_it_is_drawn_from_what_was_measured() -> None:
    picture = runpy.run_path(str(ROOT / "benchmarks" / "picture.py"))
    report = json.loads((ROOT / "docs" / "studies" / "minilm-sst2-cb" / "report.json").read_text())
    speed, search, methods = picture["draw"](report, "sst2").axes
    shown = [text.get_text() for axes in (speed, search, methods) for text in axes.texts]
    assert {"24,827", "77,317", "352 s", "107 s", "0.804", "0.821"} <= set(shown)


def test_the_figures_under_it_are_those_of_the_files() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    packed = json.loads((ROOT / "benchmarks" / "packed_search.json").read_text())["results"]
    (alone,) = (each["sides"]["one trial"]["wall_s"] for each in packed if each["batch_size"] == 2)
    assert f"one of eight trials alone takes {alone:.0f} s" in readme
    report = json.loads((ROOT / "docs" / "studies" / "minilm-sst2-cb" / "report.json").read_text())
    found = report["tasks"]["sst2"]["methods"]["gpc-recurrent"]["difference"]
    low, high = (100 * end for end in found["interval"])
    assert (
        f"GPC is {100 * found['mean']:.1f} points above prompt tuning (95 % interval {low:.1f} to {high:.1f})"
        in readme
    )
