"""`gpc-dist study --dry-run`: what a study will run, and what the planner expects it to take."""

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
    """A line for each task and method: configurations, runs, steps, and with a device the planner's hours on it.

    Nothing is read but the encoder's configuration, so runs that count in epochs have no steps here, and hours are
    counted with one row for each example (see the note under the table).

    Args:
        gpu: a device that the planner knows; none for no hours.

    Raises:
        UserError: a configuration is not accepted; an unknown device, or an encoder whose configuration cannot be had.
    """
    clock = _Clock(gpu, study.resources.ranks) if gpu else None
    lines, all_steps, all_hours = [], 0, 0.0
    for task in study.tasks:
        for method, drawn in draw(study, task).items():
            spec = SearchSpec(recipe=study.recipe_of(task), configurations=drawn, resources=study.resources)
            built = [space.trial_config(spec, each) for each in drawn]
            seeds = (len(study.search_seeds), len(study.seeds))
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
    """What all runs of a method on a task take, of what a run of each configuration takes; for the final runs that of
    the costliest one."""
    return sum(each) * search_seeds + max(each) * final_seeds


class _Clock:
    """The planner's time of a step, asked once for runs that differ in nothing that it counts with."""

    def __init__(self, gpu: str, ranks: int):
        from gpc_dist.planner.devices import find_device
        from gpc_dist.planner.timing import Cluster

        self._cluster = Cluster(find_device(gpu), 1, ranks)
        self._known: dict[str, float] = {}

    def step_s(self, config: Config) -> float:
        """Seconds of a step in the regime that the planner recommends.

        Raises:
            UserError: none fits, or the encoder's configuration cannot be had.
        """
        from gpc_dist.planner.recipe import choose, make_planner, reason

        train, data = config.train, config.data
        # where a prompt starts costs nothing, and whether the cell acts once more next to nothing
        adapter = config.adapter.model_copy(update={"prompt_init": "vocab", "pooling": "mean"})
        key = repr((adapter, train.batch_size, train.batch_tokens, train.optimizer, data.max_length))
        if key not in self._known:
            planner = make_planner(config, self._cluster.device, outputs=2)
            chosen = choose(planner, self._cluster, config.engine)
            if chosen is None:
                raise UserError(reason(None, self._cluster, config.engine))
            self._known[key] = chosen.step_s
        return self._known[key]
