"""The parts of a task's data on which a run trains and selects, among them a share held out of the training split.

Scores on a split are too good if checkpoints and settings were selected on it. With `data.holdout` they are selected
on rows of the training split that are not trained on, and the official validation split is left to
`gpc-dist evaluate`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np

from gpc_dist.config import DataConfig
from gpc_dist.errors import UserError
from gpc_dist.tasks.example import Example, limit
from gpc_dist.tasks.task import Task

Part = Literal["train", "validation", "holdout"]
"""The rows that are trained on; the official validation split; the rows held out of the training split."""

_SEED = 0
"""Not `run.seed`: all seeds and all settings must be selected on the same rows."""


def selection_part(data: DataConfig) -> Literal["validation", "holdout"]:
    """The part on which checkpoints are selected and searches compare their trials."""
    return "validation" if data.holdout is None else "holdout"


def read_part(task: Task, data: DataConfig, part: Part, seed: int | None = None) -> list[Example]:
    """The examples of a part, limited by `data.limit_train` or `data.limit_eval`.

    Args:
        seed: of the sample that `data.limit_train` draws; only for `train`.

    Raises:
        UserError: a split cannot be read (see `Task.read`), or nothing is held out.
    """
    if part == "validation":
        return limit(task.read("validation"), data.limit_eval)
    examples = task.read("train")
    if data.holdout is None:
        if part == "holdout":
            raise UserError(
                "nothing is held out of the training split here: give --data.holdout as the run had it, or "
                "--split validation"
            )
        return limit(examples, data.limit_train, seed)
    rest, held = hold_out(examples, data.holdout)
    return limit(held, data.limit_eval) if part == "holdout" else limit(rest, data.limit_train, seed)


def hold_out(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Split examples into those to train on and those held out, both in source order.

    The share is taken from each class of a classification, and in whole sources: the questions on one passage
    stay together. The split depends on the examples and the share alone.

    Raises:
        UserError: the share leaves one of them without examples.
    """
    units: dict[Hashable, list[int]] = {}
    for number, example in enumerate(examples):
        key = ("alone", number) if example.source is None else ("source", example.source)
        units.setdefault(key, []).append(number)
    strata: dict[int, list[list[int]]] = {}
    for unit in units.values():
        strata.setdefault(_stratum([examples[n] for n in unit]), []).append(unit)
    random = np.random.Generator(np.random.PCG64(_SEED))
    held: set[int] = set()
    for stratum in sorted(strata):
        members = strata[stratum]
        chosen = random.permutation(len(members))[: round(share * len(members))]
        held.update(n for index in chosen for n in members[index])
    if not 0 < len(held) < len(examples):
        raise UserError(
            f"data.holdout {share} of {len(examples)} training examples ({len(units)} that can be parted) leaves none "
            f"to {'train on' if held else 'select on'}: give another share"
        )
    parts = [[e for n, e in enumerate(examples) if (n in held) is wanted] for wanted in (False, True)]
    return parts[0], parts[1]


def _stratum(unit: Sequence[Example]) -> int:
    """The class that all examples of a unit share; -1 if there is none."""
    targets = {example.target for example in unit}
    target = targets.pop() if len(targets) == 1 else None
    return target if isinstance(target, int) else -1
