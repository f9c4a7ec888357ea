"""Files that a search writes about its trials, in the folder that tracking reads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpc_dist import files
from gpc_dist.config import Config
from gpc_dist.errors import UserError
from gpc_dist.runs.folder import SearchFolder, TrialFolder
from gpc_dist.typed import check_as

Searches = Mapping[str, SearchFolder]
"""Searches that run together, by their names; one that runs alone by the empty name."""

COMPLETED, STOPPED, FAILED = "completed", "stopped by scheduler", "failed"
"""Decisions on a trial that has ended."""


@dataclass(frozen=True)
class TrialRecord:
    """A search's record of one trial (`trial.json` in the run's folder)."""

    search: str
    trial: str
    """Ray Tune's id when the trial began; its name, where Ray Tune is not used."""
    number: int
    seed_group: str
    """Equal for the seeds of one configuration."""
    settings: Mapping[str, Any]
    """Dotted keys that the search drew, with their values."""
    seed: int | None = None
    """`run.seed`; None in records of earlier versions."""
    copied: bool = False
    """Whether the run is to start from another trial's state, and has not yet."""
    lane: int | None = None
    host: str = ""
    heard: int | None = None
    """Step of the newest evaluation on which the search has decided; None in records of earlier versions."""
    decision: str = "running"
    """running, or one of the above."""


def recipe_of(search: SearchFolder) -> Path:
    """Path of the recipe as it was when the search began: a later edit must not change some of the trials."""
    return search.path / "recipe.yaml"


def trial_name(number: int) -> str:
    """Name of a trial, which is also its folder's; numbers start at 0."""
    return f"{number:03d}"


def trial_folder(search: SearchFolder, number: int) -> TrialFolder:
    return search.trial(trial_name(number))


def name_among(search: str, number: int) -> str:
    """Name of a trial among those of `Searches`: that of its folder, after that of its search."""
    return f"{search}/{trial_name(number)}" if search else trial_name(number)


def parse_name(name: str) -> tuple[str, int]:
    """The search and the number in a name of `name_among`."""
    search, _, number = name.rpartition("/")
    return search, int(number)


def folder_among(searches: Searches, name: str) -> TrialFolder:
    """The folder of the trial with a name of `name_among`."""
    search, number = parse_name(name)
    return trial_folder(searches[search], number)


def going_on(searches: Sequence[SearchFolder]) -> str:
    """What to say of how searches go on that were cut off."""
    again = f"gpc-dist tune {searches[0].config} --resume" if len(searches) == 1 else "the same command"
    return f"go on with {again}"


def write_trial(search: SearchFolder, record: TrialRecord) -> None:
    files.write_json(trial_folder(search, record.number).trial, asdict(record))


def read_trial(search: SearchFolder, number: int) -> TrialRecord | None:
    """The record of a trial; None if it has not begun.

    Raises:
        UserError: the file is not the record of this trial.
    """
    file = trial_folder(search, number).trial
    values = files.read_json(file)
    if "settings" not in values:  # a trial that failed before it began has a decision only
        return None
    record = check_as(TrialRecord, values, str(file))
    if record.number != number:
        raise UserError(f"{file} is the record of trial {record.number}: restore or remove it")
    return record


def own_settings(search: str, run: TrialFolder, seed: int) -> dict[str, Any]:
    """The keys that a search sets itself in the run of a trial."""
    return {"run.name": f"{search}-{run.path.name}", "run.dir": str(run.path), "run.seed": seed}


def command_of(run: TrialFolder) -> list[str]:
    """The command line that repeats a trial's run."""
    return ["gpc-dist", "train", str(run.config), "--run.dir", f"{run.path}-again"]


def seed_group(drawn: Mapping[str, Any]) -> str:
    """Return a name for the drawn values, which is the same for all seeds."""
    return hashlib.sha256(repr(sorted(drawn.items())).encode()).hexdigest()[:8]


def write_refused(run: TrialFolder, config: Config, reason: str) -> None:
    """Write the files of a trial whose run was not begun, so that the folder shows the trial and why it failed."""
    files.write_text(run.config, config.to_yaml())
    run.write_status("failed", reason)
