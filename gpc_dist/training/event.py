"""What trials hear of their runs: apart from the pack, since they do without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """What a run of a pack has come to."""

    name: str
    step: int
    metrics: dict[str, float]
    """Of the evaluation; empty for a run that failed."""
    over: bool = False
    """It has left its lane: finished, or failed."""
    failure: str = ""
