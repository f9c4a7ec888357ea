"""What a run or a search came to (`result.json`), as far as other parts of the program read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpc_dist.errors import UserError
from gpc_dist.typed import is_number, read_as


@dataclass(frozen=True)
class Metrics:
    best: dict[str, Any] = field(default_factory=dict)
    """Of the best evaluation: numbers by name, None where one is not finite, and figures that are no numbers."""


@dataclass(frozen=True)
class RunResult:
    task: str = ""
    method: str = ""
    main_metric: str = ""
    selected_on: str = "validation"
    """Part of the data on which the figures are measured."""
    metrics: Metrics = field(default_factory=Metrics)
    majority_baseline: dict[str, Any] = field(default_factory=dict)
    trainable_parameters: int = 0
    frozen_parameters: int = 0
    wall_s: float = 0.0
    share_s: float | None = None
    """Seconds of the run's share in a pack."""
    world_size: int | None = None
    energy_j: float | None = None

    @property
    def best(self) -> float | None:
        """Main metric of the best evaluation; None if no evaluation gave a number."""
        return self._number(self.metrics.best)

    @property
    def baseline(self) -> float | None:
        """Main metric of the most frequent answer."""
        return self._number(self.majority_baseline)

    def _number(self, values: dict[str, Any]) -> float | None:
        value: Any = values.get(self.main_metric)
        return float(value) if is_number(value) else None


def read_result(folder: Path) -> RunResult:
    """The result of a run.

    Raises:
        UserError: the folder holds no finished run.
    """
    path = folder / "result.json"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if not path.is_file():
        raise UserError(f"{folder} holds no finished run: result.json is missing")
    found = read_as(RunResult, path)
    if found is None or not found.main_metric:
        raise UserError(f"{path} is not the result of a run")
    return found


@dataclass(frozen=True)
class SearchResult:
    metric: str = ""
    best_trial: str | None = None
    """Name of the trial with the best adapter; None if no trial was evaluated."""
    best: float | None = None
