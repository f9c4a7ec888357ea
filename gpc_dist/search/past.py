"""What a search has done before it goes on, from the files that it wrote itself.

Ray Tune saves the state of a search too, as pickles, which run code when they are read: it is never asked to restore
one. A search that goes on is a new experiment to it, in a folder of its own; what this module reads is all that the
scheduler, the searcher and the stop rules are told of the past.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpc_dist import files
from gpc_dist.errors import UserError
from gpc_dist.runs.folder import SearchFolder, TrialFolder
from gpc_dist.runs.metrics import STEP, TIME, read_metrics
from gpc_dist.search.trial_files import COMPLETED, STOPPED, TrialRecord, read_trial, trial_folder
from gpc_dist.typed import is_number


@dataclass(frozen=True)
class Evaluation:
    """The metric of a search, as a trial's run measured it."""

    time_s: float
    """Unix time."""
    step: int
    value: float


@dataclass(frozen=True)
class PastTrial:
    """A trial that has begun."""

    record: TrialRecord
    evaluations: tuple[Evaluation, ...]
    closed: bool = True
    """Whether its run has ended too; one whose search was killed as it stopped it has not."""

    @property
    def ended(self) -> bool:
        """Whether it is not trained again. One that failed is: the reason may be gone."""
        return self.record.decision in (COMPLETED, STOPPED) and self.closed


SPENT = "spent_s"

Past = Mapping[int, PastTrial]
"""The trials of a search that have begun, by their numbers."""


def read_past(folder: SearchFolder, trials: int, metric: str) -> Past:
    """Read the trials of a search.

    Args:
        trials: number of trials that the search has at most.
        metric: its name in `metrics.jsonl`.

    Raises:
        UserError: the record of a trial is damaged.
    """
    records = {number: read_trial(folder, number) for number in range(trials)}
    return {
        number: _past_trial(trial_folder(folder, number), record, metric)
        for number, record in records.items()
        if record is not None
    }


def _past_trial(folder: TrialFolder, record: TrialRecord, metric: str) -> PastTrial:
    return PastTrial(record, tuple(evaluations(folder.metrics, metric)), is_closed(folder))


def is_closed(folder: TrialFolder) -> bool:
    """Whether the run of a trial has ended with a result."""
    return folder.read_status().state in ("finished", "stopped")


def evaluations(file: Path, metric: str) -> list[Evaluation]:
    """The evaluations in a run's `metrics.jsonl` that measured the metric."""
    found: Any = ([line.get(key) for key in (TIME, STEP, metric)] for line in read_metrics(file))
    return [Evaluation(*values) for values in found if all(map(is_number, values))]


def spent_file(folder: SearchFolder) -> Path:
    """Where a search with `stop.max_s` keeps the seconds that its starts have taken."""
    return folder.path / "spent.json"


def read_spent_s(folder: SearchFolder) -> float:
    """Seconds that the starts of a search have taken.

    Raises:
        UserError: the file does not say.
    """
    file = spent_file(folder)
    spent_s = files.read_json(file).get(SPENT, 0.0)
    if not is_number(spent_s) or spent_s < 0:
        raise UserError(f"{file}: {SPENT} is {spent_s!r}, and no number of seconds: restore or remove it")
    return float(spent_s)
