"""Progress of runs: events for the caller, a progress bar or log lines for the user."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """A run was evaluated, ended or failed."""

    name: str
    step: int
    metrics: dict[str, float]
    """Metrics of the newest evaluation; empty for a run that failed."""
    over: bool = False
    """The run has finished or failed, and trains no further."""
    failure: str = ""


class Progress:
    """Progress of a run, or of what goes before it: a bar where rank 0 has a terminal, log lines elsewhere.

    Args:
        unit: what is counted.
        total: steps of the whole run.
        done: steps that were made before.
        main: whether this is rank 0.
    """

    def __init__(self, unit: str, total: int, done: int, main: bool):
        self._terminal = main and sys.stderr.isatty()
        self._total, self._first, self._start_s = total, done, time.monotonic()
        self._shown: dict[str, str] = {}
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=unit,
            disable=not self._terminal,
            dynamic_ncols=True,
        )
        self._redirected = (
            logging_redirect_tqdm([logging.getLogger("gpc_dist")]) if self._terminal else nullcontext()
        )

    def __enter__(self) -> Progress:
        self._redirected.__enter__()  # log lines above the bar
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._redirected.__exit__(kind, error, trace)
        self._bar.close()

    def step(self) -> None:
        self._bar.update()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show values of a step, such as `loss`; they stay visible until they change."""
        self._shown |= {name: _short(value) for name, value in values.items()}
        if self._terminal:
            self._bar.set_postfix(self._shown)
        else:
            per_step = (time.monotonic() - self._start_s) / max(1, step - self._first)
            left = tqdm.format_interval(per_step * (self._total - step))
            figures = "  ".join(f"{name} {value}" for name, value in self._shown.items())
            log.info("step %d/%d  %s  %s left", step, self._total, figures, left)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
