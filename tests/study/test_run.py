"""A whole study of two tasks on a tiny encoder: cut off, gone on with, and its numbers found again."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpc_dist.errors import EXIT_USAGE, UserError
from gpc_dist.study.layout import StudyFolder
from gpc_dist.study.results import read_study
from gpc_dist.study.run import check_begun, run_study
from gpc_dist.study.spec import StudySpec, load
from tests.conftest import gpc
from tests.holds import Hold
from tests.processes import command, start
from tests.rays import kill_search

METHODS = {
    "linear-probe": {},
    "prompt-tuning": {"space": {"train.lr": [1e-2, 1e-3]}},
    "gpc": {"space": {"train.lr": [1e-2, 1e-3], "train.cell_lr": [3e-4]}},
}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def trials(study: Path, stage: str, task: str = "cats") -> list[Path]:
    return sorted((study / "tasks" / task / f"{stage}-packed" / "trials").iterdir())


@pytest.fixture
def place(tmp_path: Path, tiny_recipe: Path, other_data: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(tiny_recipe.read_text())
    tiny = yaml.safe_load(tiny_recipe.read_text())
    study = {
        "encoder": {"path": tiny["encoder"]["path"]},
        "tasks": {
            "cats": {"recipe": "recipe.yaml"},
            "words": {
                "recipe": "recipe.yaml",
                "settings": {
                    "task.name": "words",
                    "task.kind": "regression",
                    "task.label": "words",
                    "data.path": str(other_data),
                    "train.eval_every": 5,
                },
            },
        },
        "methods": METHODS,
        "settings": {"train.steps": 20, "train.eval_every": 10, "engine.zero_stage": 3},
        "holdout": 0.2,
        "trials": 6,
        "resources": {"ranks": 2, "pack": 3, "cpus_per_rank": max(1, (os.cpu_count() or 1) // 2)},
        "tracking": {"enabled": False},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(study))
    return tmp_path


@pytest.mark.ray
def test_a_study_that_was_killed_goes_on_and_reports(
    place: Path, shared_ray: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = place / "studies" / "mine"
    with pytest.raises(UserError, match="holds no task that was measured on its official validation split"):
        read_study(
            StudySpec.model_validate(yaml.safe_load((place / "mine.yaml").read_text()) | {"dir": study})
        )
    kill_in_the_middle(place, study, shared_ray)
    done = command("study", "mine.yaml", cwd=place, **shared_ray)
    assert done.returncode == 0, done.stdout + done.stderr

    # of the space of two values each is tried once, and the better one has the better hold-out; the probe's only
    # configuration is not searched
    searched = trials(study, "search")
    assert len(searched) == 4
    chosen = read(study / "tasks" / "cats" / "chosen.json")
    assert chosen.pop("linear-probe").keys() == {"configuration"}
    for method, best in chosen.items():
        values = {}
        for trial in searched:
            config = yaml.safe_load((trial / "config.yaml").read_text())
            assert config["data"]["holdout"] == 0.2
            if config["adapter"]["method"] == method:
                values[config["train"]["lr"]] = read(trial / "result.json")["metrics"]["best"]["accuracy"]
        assert sorted(values) == [1e-3, 1e-2]
        assert best["holdout"] == max(values.values())
        assert values[best["configuration"]["train.lr"]] == best["holdout"]

    final = trials(study, "final")
    report = read(study / "report.json")
    for method in METHODS:
        runs = [trial for trial in final if method_of(trial) == method]
        scores = [read(trial / "official.json")["metrics"]["accuracy"] for trial in runs]
        assert len(scores) == 3
        found = report["tasks"]["cats"]["methods"][method]
        assert sorted(found["scores"].values()) == sorted(scores)
        assert found["mean"] == pytest.approx(statistics.fmean(scores))
    # the other task was trained beside it, measured by its own metric, and selected on its own hold-out
    assert "18 of 18 trials ended" in done.stdout
    assert len(trials(study, "search", "words")) == 4
    others = report["tasks"]["words"]
    assert others["metric"] != report["tasks"]["cats"]["metric"]
    assert others["methods"].keys() == report["tasks"]["cats"]["methods"].keys()
    other = read(trials(study, "final", "words")[0] / "official.json")
    assert (other["metric"], len(other["examples"])) == (others["metric"], 17)
    # the official split was read as `evaluate` reads it, whole; on two ranks at stage 3 as on one at stage 0
    official = read(final[0] / "official.json")
    assert len(official["examples"]) == 23
    right = statistics.fmean(each["target"] == each["decision"] for each in official["examples"])
    assert right == pytest.approx(official["metrics"]["accuracy"])
    alone = ("--engine.ranks", 1, "--engine.zero_stage", 0)
    evaluated = json.loads(command("evaluate", final[0] / "adapter", *alone).stdout)
    assert evaluated["metrics"] == pytest.approx(official["metrics"], rel=2e-4)
    difference = report["tasks"]["cats"]["methods"]["gpc"]["difference"]
    assert difference["interval"][0] <= difference["mean"] <= difference["interval"][1]
    assert "| gpc" in (study / "report" / "report.md").read_text()
    assert "gpc-dist inspect studies/mine/tasks/cats/final-packed/trials/" in done.stdout

    # nothing is measured or trained again
    before = {path: path.stat().st_mtime_ns for path in study.rglob("*.json") if path.name != "report.json"}
    monkeypatch.chdir(place)
    assert gpc("study", "mine.yaml") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(UserError, match="holds another study, or this one with other values"):
        run_study(load(str(study / "study.yaml"), {"trials": "3", "dir": str(study)}), [])

    # of a seed and a method that are added, where another is left out, only what they add is trained
    more = (
        "--seeds",
        "[1, 2, 3, 7]",
        "--methods.linear-probe",
        "null",
        "--methods.deep-prompt.settings",
        "{}",
    )
    done = command("study", "mine.yaml", *more, cwd=place, **shared_ray)
    assert done.returncode == 0, done.stdout + done.stderr
    trained = [path for path in before if "trials" in path.parts]
    assert {path: path.stat().st_mtime_ns for path in trained} == {path: before[path] for path in trained}
    grown = read(study / "report.json")["tasks"]["cats"]["methods"]
    assert grown.keys() == {"prompt-tuning", "gpc", "deep-prompt"}
    assert all(method["scores"].keys() == {"1", "2", "3", "7"} for method in grown.values())
    assert grown["gpc"]["scores"].items() > report["tasks"]["cats"]["methods"]["gpc"]["scores"].items()
    assert read(study / "tasks" / "cats" / "chosen.json")["gpc"] == chosen["gpc"]


def test_a_study_grows_and_nothing_of_it_changes(place: Path) -> None:
    begun = load(str(place / "mine.yaml"), {"dir": str(place / "begun")})
    folder = StudyFolder(begun.folder)
    check_begun(begun, folder)
    folder.path.mkdir()
    folder.config.write_text(begun.to_yaml())
    for grown in (
        {},
        {"official.zero_stage": "3"},
        {"tasks.more.recipe": str(place / "recipe.yaml")},
        {"seeds": "[5, 1, 2, 3]"},
        {"methods.gated.settings": "{adapter.method: gpc, adapter.cell: gated}"},
        {"methods.gpc": "null"},
    ):
        check_begun(load(str(folder.config), grown), folder)
    for changed in (
        {"tasks.cats.settings.train.steps": "9"},
        {"tasks.cats": "null", "tasks.more.recipe": "cb"},
        {"seeds": "[1, 2, 4]"},
        {"methods.gpc.settings": "{train.warmup: 0}"},
        {"trials": "3"},
    ):
        with pytest.raises(UserError, match="holds another study, or this one with other values"):
            check_begun(load(str(folder.config), changed), folder)


def method_of(trial: Path) -> str:
    return yaml.safe_load((trial / "config.yaml").read_text())["adapter"]["method"]


def kill_in_the_middle(place: Path, study: Path, environment: dict[str, str]) -> None:
    """End the study while its first search trains."""
    hold = Hold(study / "tasks" / "cats" / "search-packed" / "trials" / "000", 10)
    driver = start("study", "mine.yaml", cwd=place, **environment)
    hold.wait(lambda: driver.stdout + driver.stderr)
    kill_search(driver, place)


def test_what_a_study_will_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    assert gpc("study", "mine.yaml", "--dry-run") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["cats", "gpc", "2", "5", "100"] in lines
    assert lines[-1] == ["together", "26", "520"]
    assert not (place / "studies").exists()


def test_data_that_cannot_be_read_are_said_before_anything_is_trained(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    assert gpc("study", "mine.yaml", "--tasks.cats.settings.data.path", place / "nowhere") == EXIT_USAGE
    assert "nowhere" in capsys.readouterr().err
    assert not (place / "studies").exists()
