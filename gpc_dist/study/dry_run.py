"""`gpc-dist study --dry-run`: the runs of a study, and the hours that the planner expects for them."""

from __future__ import annotations

from typing import TypeVar

from tabulate import tabulate

from gpc_dist.config import Config
from gpc_dist.errors import UserError
from gpc_dist.search import space
from gpc_dist.search.spec import SearchSpec
from gpc_dist.study.searches import draw
from gpc_dist.study.spec import StudySpec

_Number = TypeVar("_Number", int, float)

_NOTE = (
    "Hours are the planner's, a model, for steps of runs with an encoder each: packs take less. They leave out "
    "evaluations, methods that train the encoder, and the further rows of tasks that choose (COPA has 2 for an "
    "example, ReCoRD about 10)."
)


def describe(study: StudySpec, gpu: str | None) -> str:
    """Return a line for each task and method: configurations, runs, steps, and with a device the planner's hours.

    Only the encoder's configuration is read, not the data. So runs whose length is given in epochs have no steps here,
    and hours are those for one row per example (see the note under the table).

    Args:
        gpu: a device that the planner knows; without one there are no hours.

    Raises:
        UserError: a configuration is not accepted, the device is unknown, or the encoder's configuration is not found.
    """
    clock = _Clock(gpu, study.resources.ranks) if gpu else None
    lines, all_steps, all_hours = [], 0, 0.0
    for task in study.tasks:
        for method, drawn in draw(study, task).items():
            spec = SearchSpec(recipe=study.recipe_of(task), configurations=drawn, resources=study.resources)
            built = [space.trial_config(spec, each) for each in drawn]
            # one configuration is not searched
            seeds = (len(study.search_seeds) if len(drawn) > 1 else 0, len(study.seeds))
            runs = len(drawn) * seeds[0] + seeds[1]
            known = [config.train.steps for config in built if config.train.steps is not None]
            steps = _together(known, *seeds) if len(known) == len(built) else None
            hours = None
            if clock and steps is not None and not built[0].adapter.trains_encoder:
                each = [count * clock.step_s(config) for count, config in zip(known, built, strict=True)]
                hours = _together(each, *seeds) * study.resources.ranks / 3600
            all_steps += steps or 0
            all_hours += hours or 0.0
            shown = ["-" if steps is None else f"{steps:,}", "-" if hours is None else f"{hours:,.2f}"]
            lines.append([task, method, str(len(drawn)), str(runs), *shown])
    lines.append(
        ["together", "", "", str(sum(int(line[3]) for line in lines)), f"{all_steps:,}", f"{all_hours:,.2f}"]
    )
    columns = ["task", "method", "configurations", "runs", "steps", f"{gpu}-hours"]
    if gpu is None:
        columns, lines = columns[:-1], [line[:-1] for line in lines]
    align = ["left", "left"] + ["right"] * (len(columns) - 2)
    table = tabulate(lines, columns, disable_numparse=True, colalign=align)
    return table if gpu is None else f"{table}\n\n{_NOTE}"


def _together(each: list[_Number], search_seeds: int, final_seeds: int) -> _Number:
    """Return the total over all runs of a method on a task, from the value of one run of each configuration. A final
    run counts as the costliest one."""
    return sum(each) * search_seeds + max(each) * final_seeds


class _Clock:
    """The planner's time of a step, computed once for runs that are the same to the planner."""

    def __init__(self, gpu: str, ranks: int):
        from gpc_dist.planner.devices import find_device
        from gpc_dist.planner.timing import Cluster

        self._cluster = Cluster(find_device(gpu), 1, ranks)
        self._known: dict[str, float] = {}

    def step_s(self, config: Config) -> float:
        """Return the seconds of a step in the regime that the planner recommends.

        Raises:
            UserError: no regime fits, or the encoder's configuration is not found.
        """
        from gpc_dist.planner.recipe import choose, make_planner, reason

        train, data = config.train, config.data
        # the prompt's start costs nothing, and one more application of the cell almost nothing
        adapter = config.adapter.model_copy(update={"prompt_init": "vocab", "pooling": "mean"})
        key = repr((adapter, train.batch_size, train.batch_tokens, train.optimizer, data.max_length))
        if key not in self._known:
            planner = make_planner(config, self._cluster.device, outputs=2)
            choice = choose(planner, self._cluster, config.engine)
            if choice is None:
                raise UserError(reason(None, self._cluster, config.engine))
            self._known[key] = choice.estimate.step_s
        return self._known[key]
