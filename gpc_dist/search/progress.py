"""What a search prints while it runs: one line about all trials, and a table of the best ones."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.tune.progress_reporter import ProgressReporter
from tabulate import tabulate

from gpc_dist.shown import shown_cells

_PERIOD_S = 10.0
_LISTED = 10
_STATES = {"PENDING": "waits", "PAUSED": "waits", "RUNNING": "runs", "TERMINATED": "ended", "ERROR": "failed"}


class SearchProgress(ProgressReporter):
    """Prints the state of a search every few seconds, and at its end.

    Args:
        total: number of trials of the whole search.
        metric: its name in results, `val/<metric>`; empty if trials have none in common.
        mode: `max` or `min`.
        settings: what a trial tries: name of a column -> value.
    """

    def __init__(
        self,
        total: int,
        metric: str,
        mode: str,
        settings: Callable[[Any], Mapping[str, Any]],
    ):
        self._total, self._metric, self._mode, self._settings = total, metric, mode, settings
        self._start_s = self._last_s = time.monotonic()
        self._ended_before: int | None = None

    def should_report(self, trials: list[Any], done: bool = False) -> bool:
        return done or time.monotonic() - self._last_s >= _PERIOD_S

    def report(self, trials: list[Any], done: bool, *sys_info: str) -> None:
        self._last_s = time.monotonic()
        width = shutil.get_terminal_size((120, 24)).columns
        print(self._line(trials), flush=True)
        if rows := self._rows(trials):
            print(fit(rows, width), flush=True)

    def _line(self, trials: Sequence[Any]) -> str:
        states = [_STATES[trial.status] for trial in trials]
        ended, runs, failed = (states.count(state) for state in ("ended", "runs", "failed"))
        words = [
            f"{ended} of {self._total} trials ended, {runs} run" + (f", {failed} failed" if failed else "")
        ]
        if best := self._best_first(trials):
            name = self._metric.removeprefix("val/")
            words.append(f"best {name} {self._best(best[0]):.4f} by {best[0]}")
        elapsed_s = time.monotonic() - self._start_s
        words.append(_duration(elapsed_s))
        # a search that resumes finds trials that ended in no time of its own
        self._ended_before = ended + failed if self._ended_before is None else self._ended_before
        if (new := ended + failed - self._ended_before) and (left := self._total - ended - failed) > 0:
            words[-1] += f", about {_duration(elapsed_s * left / new)} left"
        return "; ".join(words)

    def _rows(self, trials: Sequence[Any]) -> list[dict[str, Any]]:
        return [
            {
                "trial": str(trial),
                self._metric.removeprefix("val/"): f"{self._best(trial):.4f}",
                "step": trial.last_result.get("step"),
                "state": _STATES[trial.status],
                **{key: _short(value) for key, value in self._settings(trial).items()},
            }
            for trial in self._best_first(trials)[:_LISTED]
        ]

    def _best_first(self, trials: Sequence[Any]) -> list[Any]:
        evaluated = [trial for trial in trials if self._metric in trial.metric_analysis]
        return sorted(evaluated, key=self._best, reverse=self._mode == "max")

    def _best(self, trial: Any) -> float:
        return float(trial.metric_analysis[self._metric][self._mode])


def fit(rows: Sequence[Mapping[str, Any]], width: int) -> str:
    """A table with as many columns, from the left, as a line of this width takes; it names the others below."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for count in range(len(columns), 0, -1):
        text = tabulate(
            shown_cells([row.get(key) for key in columns[:count]] for row in rows),
            headers=columns[:count],
            disable_numparse=True,
        )
        if count == 1 or max(map(len, text.splitlines())) <= width:
            break
    left_out = columns[count:]
    return text + (f"\n(no room for {', '.join(left_out)})" if left_out else "")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
