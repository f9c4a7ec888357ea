"""The kinds of faults in searches, and the cases that are drawn of them."""

from __future__ import annotations

import errno
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass

from gpc_dist.errors import EXIT_ENVIRONMENT, EXIT_STOPPED
from tests.faults.case import Case
from tests.faults.strike import Strike

TRIALS, LANES, STEPS, EVERY = 4, 2, 16, 4
"""Trials of a search, those that share a pack, steps of a trial, and steps between its evaluations."""
SCHEDULERS = ("random", "asha", "pbt")


@dataclass(frozen=True)
class SearchCase(Case):
    scheduler: str
    packed: bool
    starts: tuple[tuple[Strike, ...], ...]
    """Faults of each start of the search; those that follow have none."""

    @property
    def exact(self) -> bool:
        """Whether a search without a fault decides the same."""
        return self.scheduler == "random" or (self.scheduler == "asha" and not self.packed)


_RANK = ("open", "add", "step", "evaluation", "save", "sync", "saved", "close")
_TRIAL = ("join", "report", "leave")
_DRIVER = ("start", "write", "heard", "note", "noted", "end")
_COUNTS = {"start": 7, "write": 5, "end": 4}
"""Of the moments of a search that has one process, how many there are."""
_EVALUATIONS = ("evaluation", "save", "saved", "report", "heard")


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    what: str
    """See `Strike.kind`."""
    moments: tuple[str, ...]
    codes: frozenset[int] = frozenset()
    """Exit codes that are right, apart from 0 of a search that the fault did not reach or harm."""
    target: str = "self"
    times: int = 3
    """Faults of a case: in one start where the search goes on by itself, otherwise each in a start of its own."""
    detail: Callable[[random.Random], int] = lambda _: 0
    says: str = ""
    """What the error must say, if there is one."""
    survives: bool = False
    """Whether the search ends as if there were no fault, with all trials."""

    @property
    def ends(self) -> bool:
        return bool(self.codes)


def _pause(draw: random.Random) -> int:
    return draw.randrange(50, 1500)


def _errno(draw: random.Random) -> int:
    return draw.choice([errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])


def _quota(draw: random.Random) -> int:
    return int(2 ** draw.uniform(10, 14))


def _bit(draw: random.Random) -> int:
    return draw.randrange(2**16)


def _driver(name: str, *codes: int) -> Kind:
    number = signal.Signals[name]
    return Kind(name, (*_RANK, *_TRIAL, *_DRIVER), frozenset({128 + number, -number, *codes}), "driver")


_MACHINE = frozenset({EXIT_ENVIRONMENT})
_SAVED = ("step", "report", "heard")
_INSIDE = (*_RANK, *_TRIAL, "heard", "note")

KINDS: dict[str, Kind] = {
    "search-driver-SIGKILL": _driver("SIGKILL"),
    "search-driver-SIGTERM": _driver("SIGTERM", EXIT_STOPPED),
    "search-driver-SIGINT": _driver("SIGINT", EXIT_STOPPED),
    "search-driver-pause": Kind(
        "pause", (*_RANK, *_TRIAL, *_DRIVER), target="driver", times=6, detail=_pause, survives=True
    ),
    "search-driver-error": Kind("error", ("write",), _MACHINE, detail=_errno),
    "search-driver-quota": Kind("quota", _DRIVER, _MACHINE, detail=_quota),
    "search-trial-SIGKILL": Kind("SIGKILL", _TRIAL, survives=True),
    "search-trial-pause": Kind("pause", _TRIAL, times=6, detail=_pause, survives=True),
    "search-trial-raise": Kind("raise", _TRIAL, survives=True),
    "search-trial-error": Kind("error", ("join", "report"), detail=_errno, survives=True),
    "search-rank-SIGKILL": Kind("SIGKILL", _RANK, survives=True),
    "search-rank-pause": Kind("pause", _RANK, times=6, detail=_pause, survives=True),
    "search-rank-raise": Kind("raise", _RANK, survives=True),
    "search-rank-memory": Kind("memory", _RANK, survives=True),
    "search-rank-error": Kind("error", ("add", "save", "sync", "close"), detail=_errno, survives=True),
    "search-rank-quota": Kind("quota", _RANK, detail=_quota),
    "search-lane-nan": Kind("lane", ("step",), times=1),
    "search-packs-SIGKILL": Kind("SIGKILL", _INSIDE, _MACHINE, "packs"),
    "search-gcs-SIGKILL": Kind("SIGKILL", _INSIDE, _MACHINE, "gcs_server", times=1),
    "search-raylet-SIGKILL": Kind("SIGKILL", _INSIDE, _MACHINE, "raylet"),
    "search-cluster-SIGKILL": Kind("SIGKILL", ("start", "heard", "note"), _MACHINE, "cluster", times=1),
    "search-moved": Kind("moved", ("step", "save", "report", "heard", "note"), _MACHINE, times=1),
    "search-torn": Kind("SIGKILL", _SAVED, frozenset({-9, 137}), "driver", times=1, detail=_bit),
    "search-bit": Kind("SIGKILL", _SAVED, frozenset({-9, 137}), "driver", times=1, detail=_bit),
}
"""By name. After `torn` and `bit` the last lines or the newest checkpoints of trials are damaged."""


def draw_strike(chance: random.Random, how: Kind, scheduler: str) -> Strike:
    moment, trial = chance.choice(how.moments), chance.randrange(TRIALS)
    # of those that a scheduler may stop, what they do in any case
    steps = EVERY if scheduler == "asha" and trial else STEPS
    if moment in _COUNTS or moment == "open":
        trial, number = 0, chance.randint(1, _COUNTS.get(moment, 1))
    elif moment in _EVALUATIONS:
        number = EVERY * chance.randint(1, steps // EVERY)
    elif how.what == "lane":  # what is skipped is not to be saved
        number = EVERY * chance.randrange(steps // EVERY) + 1
    elif moment == "step":
        number = chance.randint(1, steps)
    else:
        number = chance.randint(1, {"sync": 6, "note": 2, "noted": 2}.get(moment, 1))
    return Strike(how.what, moment, trial, number, how.target, how.detail(chance))


def described(case: SearchCase) -> str:
    """The faults of a case in words."""
    places = [
        f"{strike.moment} {strike.number} of {strike.trial:03d} ({strike.target} {strike.detail})"
        for strikes in case.starts
        for strike in strikes
    ]
    return f"{case.scheduler}, {'packed' if case.packed else 'one by one'}: {', '.join(places)}"
