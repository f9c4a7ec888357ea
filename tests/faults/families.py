"""All families of faults."""

from __future__ import annotations

from pathlib import Path

from tests.faults.case import Family
from tests.faults.jobs import Jobs
from tests.faults.records import Records
from tests.faults.runs import Runs
from tests.faults.searches import Searches

FAMILIES: tuple[type[Family], ...] = (Runs, Records, Jobs, Searches)

KINDS = tuple(kind for family in FAMILIES for kind in family.kinds)
"""Each is of one family."""


def family_of(kind: str) -> type[Family]:
    return next(family for family in FAMILIES if kind in family.kinds)


def made(family: type[Family], folder: Path) -> Family:
    """The family, in a folder of its own."""
    place = folder / family.__name__.lower()
    place.mkdir(parents=True, exist_ok=True)
    return family(place)  # type: ignore[call-arg]
