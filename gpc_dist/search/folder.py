"""The folder of a search: where its trials' runs and its own records lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpc_dist import files
from gpc_dist.tracking.folder import RunFolder


@dataclass(frozen=True)
class TrialRecord:
    """What a search knows of one of its runs (`trial.json` in the run's folder)."""

    search: str
    trial: str
    """Ray Tune's id."""
    number: int
    seed_group: str
    """Equal for the seeds of one configuration."""
    settings: Mapping[str, Any]
    """Dotted keys that the search drew."""
    lane: int | None = None
    host: str = ""
    decision: str = "running"
    """running, completed, stopped by scheduler, or failed."""


class SearchFolder:
    """Paths of one search.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path).absolute()
        self.run = RunFolder(self.path)
        """Its `status.json`, `facts.json` and `result.json`."""
        self.spec = self.path / "search.yaml"
        self.ray = self.path / "ray"
        """Ray Tune's own records."""
        self.trials = self.path / "trials"

    def trial(self, number: int) -> RunFolder:
        return RunFolder(self.trials / f"{number:03d}")

    def write_trial(self, record: TrialRecord) -> None:
        files.write_json(self.trial(record.number).path / "trial.json", asdict(record))

    def read_trial(self, number: int) -> dict[str, Any]:
        """The record of a trial as plain values; empty when there is none."""
        return files.read_json(self.trial(number).path / "trial.json")
