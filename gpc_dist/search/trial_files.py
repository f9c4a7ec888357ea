"""Files that a search writes about its trials, in the folder that tracking reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpc_dist import files
from gpc_dist.runs.folder import SearchFolder, TrialFolder


@dataclass(frozen=True)
class TrialRecord:
    """A search's record of one trial (`trial.json` in the run's folder)."""

    search: str
    trial: str
    """Ray Tune's id."""
    number: int
    seed_group: str
    """Equal for the seeds of one configuration."""
    settings: Mapping[str, Any]
    """Dotted keys that the search drew, with their values."""
    lane: int | None = None
    host: str = ""
    decision: str = "running"
    """running, completed, stopped by scheduler, or failed."""


def recipe_of(search: SearchFolder) -> Path:
    """Path of the recipe as it was when the search began: a later edit must not change some of the trials."""
    return search.path / "recipe.yaml"


def trial_name(number: int) -> str:
    """Name of a trial, which is also its folder's; numbers start at 0."""
    return f"{number:03d}"


def trial_folder(search: SearchFolder, number: int) -> TrialFolder:
    return search.trial(trial_name(number))


def write_trial(search: SearchFolder, record: TrialRecord) -> None:
    files.write_json(trial_folder(search, record.number).trial, asdict(record))
