"""Where a study keeps what it has found: one folder for each task, with searches in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from gpc_dist import files
from gpc_dist.runs.folder import SearchFolder

Stage = Literal["search", "final"]
"""The runs that configurations are chosen by; and those of the chosen ones that are reported."""
Part = Literal["packed", "alone"]
"""The runs that can share an encoder; and those that train it, each with one of its own."""


class TaskFolder:
    """What was tried, chosen and measured on one task."""

    def __init__(self, path: Path):
        self.path = path
        self.drawn = path / "drawn.json"
        """Of each method, its configurations."""
        self.chosen = path / "chosen.json"
        """Of each method, the configuration that did best on the hold-out."""

    def search(self, stage: Stage, part: Part) -> SearchFolder:
        return SearchFolder(self.path / f"{stage}-{part}")

    def searches(self, stage: Stage) -> list[SearchFolder]:
        """The searches of a stage that have begun."""
        both = (self.search(stage, part) for part in ("packed", "alone"))
        return [search for search in both if search.config.exists()]


class StudyFolder:
    """Paths of a study."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "study.yaml"
        self.report = path / "report"

    def task(self, name: str) -> TaskFolder:
        return TaskFolder(self.path / "tasks" / name)


def official(trial: Path) -> Path:
    """What a trial's adapter decided on the official validation split."""
    return trial / "official.json"


def read_official(trial: Path) -> dict[str, Any]:
    """Empty where the trial was not evaluated on the official validation split."""
    return files.read_json(official(trial))
