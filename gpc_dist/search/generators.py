"""Where Ray Tune gets its trials from: its own generators, which begin with the trials that a search has recorded."""

from __future__ import annotations

import sys
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.result import TRAINING_ITERATION
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm
from ray.tune.search.search_generator import SearchGenerator

from gpc_dist.search.past import Past
from gpc_dist.search.trial import STEP


class _GoesOn(SearchAlgorithm):
    """Makes the trials of a search in their order, so that each gets its number again, and the next one is the first
    that has not begun. Those that have ended are handed out as ended: Ray Tune does not start them.

    Args:
        past: the trials that have begun.
        metric: its name in results.
        concurrent: largest number of trials at the same time.
    """

    def __init__(self, past: Past, metric: str, concurrent: int, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._past, self._value, self._concurrent = past, metric, concurrent
        self._waiting: list[Trial] = []
        self._going: list[Trial] = []

    def add_configurations(self, experiments: Any) -> None:
        super().add_configurations(experiments)
        limit: Any = getattr(self, "searcher", self)
        limit.max_concurrent = sys.maxsize
        made = [self._make(number) for number in range(max(self._past, default=-1) + 1)]
        limit.max_concurrent = self._concurrent
        # the scheduler must know all that have ended before it decides on another one
        self._waiting = sorted(made, key=lambda trial: not trial.is_finished())

    def _make(self, number: int) -> Trial:
        trial = super().next_trial()
        assert trial is not None
        past = self._past.get(number)
        for each in past.evaluations if past else ():
            trial.update_last_result({self._value: each.value, STEP: each.step, TRAINING_ITERATION: 1})
        if past and past.ended:
            trial.set_status(Trial.TERMINATED)
            last = {self._value: past.evaluations[-1].value} if past.evaluations else None
            self.on_trial_complete(trial.trial_id, result=last)
        return trial

    def next_trial(self) -> Trial | None:
        if not self._waiting:
            return super().next_trial()
        if not self._waiting[0].is_finished():
            if sum(not trial.is_finished() for trial in self._going) >= self._concurrent:
                return None
            self._going.append(self._waiting[0])
        return self._waiting.pop(0)

    def is_finished(self) -> bool:
        return not self._waiting and super().is_finished()

    def set_finished(self) -> None:
        self._waiting.clear()
        super().set_finished()

    def save_to_dir(self, dirpath: str, session_str: str = "", **_: Any) -> None:
        """Ray Tune would save a state, as a pickle, that nobody reads."""


class Variants(_GoesOn, BasicVariantGenerator):
    """Trials of a space that is given as a list."""


class Suggestions(_GoesOn, SearchGenerator):
    """Trials that a searcher suggests, within a `ConcurrencyLimiter`."""
