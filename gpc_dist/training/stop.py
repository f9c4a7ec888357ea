"""A stop on request: the signal only sets a flag, which the loop reads at a step's end."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """While it is entered, SIGINT, SIGTERM and SIGUSR2 ask for a stop.

    A second Ctrl-C ends at once, lest a stuck step keep the user from ending the program. The others may come
    several times: a batch system tells a job's script and its processes, and repeats itself.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the signal that came, if one came."""
        self._previous: dict[int, Any] = {}

    def listen(self, *numbers: signal.Signals) -> None:
        """Take these signals for the request already; the others still end the process."""
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
