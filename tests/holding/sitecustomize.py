"""Holds a run of the program at a step, for a test. Python imports this at its start: the folder is on PYTHONPATH.

The file that `tests.holds.Hold` puts down is renamed when the step is logged, and the run waits until that one is
removed, or until it is asked to stop. A step that is made again, by a run that goes on, is not held.

In the ranks of jobs of the campaign of faults, it lets the fault happen (`tests.faults.inject.join`).
"""

import os
import time

if "TESTS_HOLDS" in os.environ:
    from gpc_dist.runs.metrics import MetricLog
    from gpc_dist.training.stop import StopRequest
    from tests.holding import hold_files

    append, handle = MetricLog.append, StopRequest._handle
    asked = []

    def append_and_hold(self, step, metrics, time_s=None):
        append(self, step, metrics, time_s)
        if self._path.name != "metrics.jsonl":
            return
        waiting, held = hold_files(self._path.parent, step)
        try:
            waiting.rename(held)
        except FileNotFoundError:
            return
        while held.exists() and not asked:
            time.sleep(0.01)

    def handle_and_note(self, number, frame):
        handle(self, number, frame)
        asked.append(number)

    MetricLog.append = append_and_hold
    StopRequest._handle = handle_and_note

if "TESTS_JOB" in os.environ:
    from tests.faults import inject

    inject.join()
