"""Reaches into processes of the program for a test. Python imports this at its start: the folder is on PYTHONPATH.

Holds: the file that `tests.holds.Hold` puts down is renamed when the step is logged, and the run waits until that one
is removed, or until it is asked to stop. A step that is made again, by a run that goes on, is not held.

Faults of the campaign: in the ranks of jobs (`tests.faults.inject.join`), and in Ray's workers (`tests.faults.strike`).
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

if "TESTS_FAULTS" in os.environ:
    from tests.faults.strike import watch_workers

    watch_workers()
