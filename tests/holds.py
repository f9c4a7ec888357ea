"""A run that stands still at a step, wherever it runs: on ranks of this machine, in a Slurm job, in a search's lane."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.holding import hold_files
from tests.processes import wait_until


class Hold:
    """Asks the process that logs this step of a run to wait: until `release`, or until it is asked to stop.

    Make it before the run gets there. The ranks of a search are not asked themselves: release them. See
    `holding/sitecustomize.py`.
    """

    def __init__(self, run: Path, step: int):
        self._waiting, self._held = hold_files(run, step)
        self._waiting.touch()

    def wait(self, failed: Callable[[], str] = str) -> None:
        """Wait until the step has been logged; from then on the run stands still.

        Args:
            failed: what to say if that does not happen.
        """
        wait_until(self._held.exists, failed=failed)

    def release(self) -> None:
        """Let the run go on, or never hold it."""
        for file in (self._waiting, self._held):
            file.unlink(missing_ok=True)
