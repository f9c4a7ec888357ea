"""Paths of a study's files: one folder for each task, with its searches in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from gpc_dist import files
from gpc_dist.runs.folder import SearchFolder

Stage = Literal["search", "final"]
"""`search`: runs from which configurations are chosen, of methods with several; `final`: runs of the chosen ones, which
are reported."""
Part = Literal["packed", "alone"]
"""`packed`: runs that can share an encoder; `alone`: runs that train the encoder, each with a copy of its own."""


class TaskFolder:
    """Paths of what was drawn, chosen and run on one task."""

    def __init__(self, path: Path):
        self.path = path
        self.drawn = path / "drawn.json"
        """The configurations of each method."""
        self.chosen = path / "chosen.json"
        """The best configuration of each method on the hold-out, or its only one."""

    def search(self, stage: Stage, part: Part, before: int = 0) -> SearchFolder:
        """Return the search that comes after so many others: seeds and methods that are added have searches of their
        own."""
        return SearchFolder(self.path / (f"{stage}-{part}-{before + 1}" if before else f"{stage}-{part}"))

    def begun(self, stage: Stage, part: Part) -> list[SearchFolder]:
        """Return the searches that have begun, in their order."""
        found: list[SearchFolder] = []
        while (search := self.search(stage, part, len(found))).config.exists():
            found.append(search)
        return found

    def searches(self, stage: Stage) -> list[SearchFolder]:
        """Return the searches of a stage that have begun."""
        return [*self.begun(stage, "packed"), *self.begun(stage, "alone")]


class StudyFolder:
    """Paths of a study."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "study.yaml"
        self.report = path / "report"
        self.numbers = path / "report.json"
        """Every number of the report."""

    def task(self, name: str) -> TaskFolder:
        return TaskFolder(self.path / "tasks" / name)


def official(trial: Path) -> Path:
    """Path of the scores and decisions of a trial's adapter on the official validation split."""
    return trial / "official.json"


def read_official(trial: Path) -> dict[str, Any]:
    """Read the file of `official`; empty if the trial was not evaluated on the official validation split."""
    return files.read_json(official(trial))
