"""Stop on request: a signal only sets a flag, which the trainer reads in every step and evaluation batch."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """Context manager in which SIGINT, SIGTERM and SIGUSR2 request a stop.

    A second Ctrl-C ends the program at once, because a step may be stuck. The other signals may arrive several
    times: a batch system sends them to a job's script and to its processes, and repeats them.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the last signal received; None if there was none."""
        self._previous: dict[int, Any] = {}

    def listen(self, *numbers: signal.Signals) -> None:
        """Treat these signals as requests from now on, before the context is entered; others still end the process."""
        for number in numbers:
            self._previous.setdefault(number, signal.signal(number, self._handle))

    def __enter__(self) -> StopRequest:
        self.listen(*SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])
