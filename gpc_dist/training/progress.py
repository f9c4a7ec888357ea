"""What the user sees while a run goes on: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Progress of a run on rank 0; silent on the other ranks.

    Args:
        total: steps of the whole run; `done` of them were made before.
    """

    def __init__(self, total: int, done: int, enabled: bool):
        self._enabled = enabled
        self._terminal = sys.stderr.isatty()
        self._total, self._first, self._start_s = total, done, time.monotonic()
        self._shown: dict[str, str] = {}
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            disable=not (enabled and self._terminal),
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def step(self) -> None:
        self._bar.update()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show figures of a step, such as `loss`; they stay until they change."""
        self._shown |= {name: _short(value) for name, value in values.items()}
        if self._terminal:
            self._bar.set_postfix(self._shown)
        else:
            per_step = (time.monotonic() - self._start_s) / max(1, step - self._first)
            left = tqdm.format_interval(per_step * (self._total - step))
            figures = "  ".join(f"{name} {value}" for name, value in self._shown.items())
            self.say(f"step {step}/{self._total}  {figures}  {left} left")

    def say(self, message: str) -> None:
        """A line of its own."""
        if self._enabled:
            self._bar.write(message, file=sys.stderr)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
