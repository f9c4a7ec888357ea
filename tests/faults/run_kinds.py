"""The kinds of faults in single runs."""

from __future__ import annotations

import errno
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass

from gpc_dist.errors import EXIT_ENVIRONMENT, EXIT_STOPPED, EXIT_USAGE
from tests.faults.case import Case
from tests.faults.inject import Fault

TIMEOUT_S = 20
"""`engine.timeout_s` of runs."""
_SHORT_S = 10
"""That of those which are to wait for it."""
EVERYWHERE = ("start", "step", "collective", "evaluation", "save", "prune", "end")


@dataclass(frozen=True)
class RunCase(Case):
    ranks: int
    stage: int
    faults: tuple[tuple[str, Fault], ...]
    """By the names of their kinds; their visits are still open."""
    at: tuple[float, ...]
    """Of each fault which of the visits it is, from 0 for the first to 1."""


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    moments: tuple[str, ...]
    codes: frozenset[int]
    """Exit codes that are right, apart from 0 of a run that the fault did not reach or harm."""
    says: str = ""
    """What the error must say, if there is one; a pattern."""
    arrangements: tuple[tuple[int, int], ...] = ((1, 0), (2, 0), (2, 1), (2, 3))
    """Ranks and ZeRO stage."""
    targets: tuple[str, ...] = ("self",)
    detail: Callable[[random.Random], int] = lambda _: 0
    rank: int | None = None
    """The only rank in which it happens."""
    span: tuple[float, float] = (0, 1)
    """Of the visits of its moment, those at which it happens."""
    timeout_s: int = TIMEOUT_S
    """`engine.timeout_s` of the run that the fault happens in."""
    injected: str = ""
    """Name of what happens, if it is not that of the kind."""


_WHOM = ("self", "launcher", "ranks")


def _signal(name: str, *codes: int) -> Kind:
    number = signal.Signals[name]
    return Kind(EVERYWHERE, frozenset({128 + number, -number, *codes}), targets=_WHOM)


def _errno(draw: random.Random) -> int:
    return draw.choice([errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])


def _bit(draw: random.Random) -> int:
    return draw.randrange(2**16)


_MACHINE = frozenset({EXIT_ENVIRONMENT})
_SHARED = ((2, 0), (2, 1), (2, 3))

# once there is a checkpoint
_KILLED = Kind(("step",), frozenset({-9, 128 + 9}), rank=0, injected="SIGKILL", detail=_bit, span=(0.4, 1))


def _bytes(draw: random.Random) -> int:
    return int(2 ** draw.uniform(12, 17))


def _jump(draw: random.Random) -> int:
    return draw.choice([-1, 1]) * int(10 ** draw.uniform(1, 8))


KINDS: dict[str, Kind] = {
    "SIGKILL": _signal("SIGKILL"),
    "SIGTERM": _signal("SIGTERM", EXIT_STOPPED),
    "SIGINT": _signal("SIGINT", EXIT_STOPPED),
    "SIGUSR2": _signal("SIGUSR2", EXIT_STOPPED),
    "pause": Kind(EVERYWHERE, frozenset(), targets=_WHOM, detail=lambda draw: draw.randrange(50, 1500)),
    "stop": Kind(
        ("start", "step", "evaluation", "save"),
        _MACHINE,
        "did not|could not join",
        arrangements=_SHARED,
        timeout_s=_SHORT_S,
    ),
    # the other rank is lost, and may be found first
    "raise": Kind(EVERYWHERE, frozenset({1, EXIT_ENVIRONMENT})),
    "memory": Kind(EVERYWHERE, _MACHINE, "memory"),
    # all of its steps are before a save, or those left out would be saved
    "nan": Kind(("step",), frozenset({EXIT_USAGE}), "not finite", span=(0, 0.05)),
    "gradient": Kind(("step",), frozenset(), detail=_bit),
    "weight": Kind(("step",), _MACHINE, "changed in the memory of rank", detail=_bit),
    "adapter": Kind(("step",), _MACHINE, "the adapter differs", arrangements=((2, 0),), detail=_bit),
    "error": Kind(("save", "prune"), _MACHINE, detail=_errno, rank=0),
    "quota": Kind(EVERYWHERE, _MACHINE, detail=_bytes, rank=0),
    "full": Kind(EVERYWHERE, _MACHINE, detail=_bytes, rank=0),
    "readonly": Kind(EVERYWHERE, _MACHINE, rank=0),
    "power": Kind(EVERYWHERE, frozenset({-9, 128 + 9}), rank=0),
    "clock": Kind(EVERYWHERE, frozenset(), detail=_jump),
    "deleted": Kind(("step", "evaluation", "save"), _MACHINE, rank=0),
    "moved": Kind(("step", "evaluation", "save"), _MACHINE, rank=0),
    "twice": Kind(("step", "evaluation", "save"), frozenset(), injected="hold", rank=0),
    "absent": Kind(("never",), _MACHINE, "could not join", arrangements=_SHARED, timeout_s=_SHORT_S),
    "port": Kind(("never",), _MACHINE, "could not join", arrangements=_SHARED, timeout_s=_SHORT_S),
    "bit": _KILLED,
    "cut": _KILLED,
    "torn": _KILLED,
}
"""By name. `bit`, `cut` and `torn` damage the newest checkpoint or the metrics after the run was killed; in `twice` the
same command is given while the run goes on; in `absent` the other ranks are never started."""

PAIRED = (
    "SIGKILL",
    "SIGTERM",
    "SIGINT",
    "SIGUSR2",
    "pause",
    "raise",
    "memory",
    "weight",
    "error",
    "quota",
    "power",
    "clock",
    "moved",
)
"""Kinds of which two are drawn for a `pair`: in one run, or the second in that which goes on after the first."""

NOT_DETECTED = ("gradient",)
"""Kinds after which a run goes on to another result, as the documentation says."""
