"""`metrics.jsonl` and the telemetry files: one JSON object per line, each with its time."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from gpc_dist import files
from gpc_dist.typed import is_number

STEP = "step"
TIME = "time_s"


class MetricLog:
    """Appends measurements to a file that can be read at any time.

    A line is `{"step": 10, "time_s": 1700000000.0, "train/loss": 0.5, ...}` and is written by one
    system call where there is room. JSON has no NaN and no infinity, so every non-finite value is written as `null`,
    which pandas and the exporter read as NaN. There is one writer per file.

    Args:
        path: the file; created with its folder if absent. A last line torn by a crash is removed.
    """

    def __init__(self, path: Path) -> None:
        files.make_folder(path.parent)
        self._path = path
        self._open()

    def append(self, step: int, metrics: Mapping[str, SupportsFloat], time_s: float | None = None) -> None:
        """Write one line.

        Args:
            step: optimizer step of the values, not lower than in the line before; in telemetry the sample's number.
            metrics: name -> number (numpy and torch scalars too), names such as `train/loss`.
            time_s: unix time of the measurement; now when not given.

        Raises:
            ValueError: a metric is named `step` or `time_s`.
        """
        if reserved := {STEP, TIME} & metrics.keys():
            raise ValueError(f"metric name(s) {sorted(reserved)} are taken by the log itself")
        line: dict[str, Any] = {STEP: step, TIME: time.time() if time_s is None else time_s}
        line.update((name, _json_number(value)) for name, value in metrics.items())
        left = memoryview(json.dumps(line, allow_nan=False).encode() + b"\n")
        while left:  # a disk that becomes full takes a part, and says so when it is asked for the rest
            left = left[self._file.write(left) :]

    def truncate_after(self, step: int) -> None:
        """Remove the lines with a larger step, because a run that resumes at `step` writes them again."""
        kept = [line for line in read_metrics(self._path) if line[STEP] <= step]
        self._file.close()
        files.write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._open()

    def sync(self) -> None:
        """Make all lines survive a power cut. What says that their steps are done must be written after this."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        # unbuffered and O_APPEND: each line is one system call, whatever its length
        self._file = self._path.open("ab", buffering=0)
        _drop_torn_line(self._path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file in order, without a torn last line, and without those that no `MetricLog` wrote;
    empty if the file is absent."""
    lines, _ = files.read_lines(path)
    return [line for line in lines if is_step(line.get(STEP)) and is_number(line.get(TIME, 0.0))]


def is_step(value: Any) -> bool:
    """Whether a value can be the number of a step."""
    return type(value) is int and 0 <= value < 2**63


def _json_number(value: SupportsFloat) -> float | None:
    if isinstance(value, int):  # so that counters have no decimal point
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def _drop_torn_line(path: Path) -> None:
    size = path.stat().st_size
    _, complete = files.read_lines(path)
    if complete < size:
        os.truncate(path, complete)
