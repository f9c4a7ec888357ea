"""The space of a search: checks against the configuration, and conversion for Ray Tune and Optuna.

A sample is a flat mapping of dotted keys to values, as Ray Tune and Optuna draw it; `settings_of` converts it to the
settings of one trial. Only Ray Tune and Optuna draw.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from graphlib import CycleError, TopologicalSorter
from typing import Any, Literal

from gpc_dist import config
from gpc_dist.config import Config
from gpc_dist.errors import UserError
from gpc_dist.search.distribution import Distribution
from gpc_dist.search.spec import SearchSpec
from gpc_dist.typed import is_number

NOT_SET = "not set"
"""Value in Ray's samples of a key whose condition does not hold."""

_FIXED_ONCE_STARTED = frozenset(
    f"train.{name}" for name in ("steps", "epochs", "batch_size", "batch_tokens", "optimizer")
)
"""Keys that cannot change when a run resumes: they determine its length, data order and optimizer state."""

_MOST_COMBINATIONS = 2000
"""Largest number of combinations that `validate` builds, because more would take longer than a second or two."""


def base_config(spec: SearchSpec) -> Config:
    """Return one configuration of the search, to read from it what all of them have in common."""
    if spec.configurations is not None:
        return trial_config(spec, spec.configurations[0])
    return trial_config(spec, {key: held.probes()[0] for key, held in spec.space.items() if not held.when})


def trial_config(spec: SearchSpec, sample: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> Config:
    """Return the configuration of one trial.

    Args:
        own: values of the keys that the search sets itself (`run.dir`, `run.seed`, ...).

    Raises:
        UserError: the configuration does not accept a value, or not all of them together.
    """
    return _build(spec, config.recipe_tree(spec.recipe), settings_of(sample) | dict(own or {}))


def settings_of(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dotted settings of a sample, without the keys whose conditions do not hold."""
    return {key: value for key, value in sample.items() if value != NOT_SET}


def _build(spec: SearchSpec, tree: dict[str, Any], settings: Mapping[str, Any]) -> Config:
    own = {"engine.ranks": spec.resources.ranks} | ({"task.metric": spec.metric} if spec.metric else {})
    own |= {f"tracking.{key}": value for key, value in spec.tracking.model_dump().items()}
    return config.apply(tree, {**spec.settings, **own, **settings})


def goal(spec: SearchSpec) -> tuple[str, Literal["max", "min"]]:
    """Return the metric to optimise, without `val/`, and whether to maximise or minimise it.

    Raises:
        UserError: the task has no such metric, or cannot be made; or the trials have several tasks without a metric in
            common.
    """
    from gpc_dist.tasks import make_task  # imports numpy and scikit-learn

    sections = {(each.task.model_dump_json(), each.data.model_dump_json()): each for each in _tasks(spec)}
    first, *others = (make_task(each.task, each.data) for each in sections.values())
    if other := next((task for task in others if task.main_metric != first.main_metric), None):
        raise UserError(
            f"trials of task {first.name} are measured by {first.main_metric}, and those of {other.name} by "
            f"{other.main_metric}: a search has one metric; give each task a search, or all of them a study"
        )
    return first.main_metric, spec.mode or ("max" if first.greater_is_better else "min")


def _tasks(spec: SearchSpec) -> Iterator[Config]:
    """Configurations with every task that trials have."""
    if spec.configurations is not None:
        yield from (trial_config(spec, each) for each in spec.configurations)
        return
    yield base_config(spec)
    live = _live(spec)
    for key in live:
        if key.startswith("task."):
            yield from (trial_config(spec, _probe(live, key, value)) for value in live[key].probes())


def validate(spec: SearchSpec) -> None:
    """Check a search for errors that would otherwise occur in the middle of it.

    Raises:
        UserError: the recipe or the settings are not valid; a value that can be drawn is not accepted; conditions
            never hold or form a circle; the algorithm or the scheduler cannot draw from a distribution; trials are to
            be compared that have different tasks.
    """
    _check_compared(spec)
    if spec.configurations is not None:
        _check_configurations(spec, spec.configurations)
        return
    for key, distribution in _ordered(spec).items():
        _check_kind(spec, key, distribution)
        for other, accepted in distribution.when.items():
            _check_condition(spec, key, other, accepted)
    _check_values(spec)
    if spec.scheduler.name == "pbt" and not _mutated(spec):
        raise UserError(
            "scheduler.name 'pbt' changes keys of train. while trials run, and the space has none that can be "
            f"(without conditions, and none of {', '.join(sorted(_FIXED_ONCE_STARTED))}): give train.lr"
        )


def _check_compared(spec: SearchSpec) -> None:
    comparing = {
        f"scheduler.name '{spec.scheduler.name}'": spec.scheduler.name != "fifo",
        "algorithm 'optuna'": spec.algorithm == "optuna",
        "stop.threshold": spec.stop.threshold is not None,
        "stop.patience": spec.stop.patience is not None,
    }
    if "task.name" in spec.tried_keys and any(comparing.values()):
        found = next(key for key, compares in comparing.items() if compares)
        raise UserError(
            f"{found} compares trials while they run, and task.name gives them different tasks: leave it out, or give "
            "each task a search"
        )


def _check_configurations(spec: SearchSpec, configurations: Sequence[Mapping[str, Any]]) -> None:
    """Check listed configurations. They may differ in any key: those that cannot share a pack get different packs."""
    tree = config.recipe_tree(spec.recipe)
    for number, each in enumerate(configurations, start=1):
        try:
            built = _build(spec, tree, each)
        except UserError as error:
            raise UserError(f"configurations: number {number} is not accepted: {error}") from None
        _check_frozen(spec, built)


def _check_frozen(spec: SearchSpec, built: Config) -> None:
    if spec.resources.pack > 1 and built.adapter.trains_encoder:
        raise UserError(
            "adapter.method fine-tuning changes the encoder, which the trials in one pack share: give "
            "--resources.pack 1"
        )


def _ordered(spec: SearchSpec) -> dict[str, Distribution]:
    """Return the searched keys, each after the keys in its conditions."""
    graph = {key: [k for k in held.when if k in spec.space] for key, held in spec.space.items()}
    try:
        return {key: spec.space[key] for key in TopologicalSorter(graph).static_order()}
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        raise UserError(f"space: conditions form a circle: {circle}; leave out one of them") from None


def _check_kind(spec: SearchSpec, key: str, distribution: Distribution) -> None:
    if spec.algorithm == "grid" and not distribution.is_list:
        raise UserError(f"space.{key}: algorithm grid needs a list of values, not {distribution.kind}")
    if spec.algorithm == "optuna" and distribution.kind == "grid":
        raise UserError(f"space.{key}: algorithm optuna draws, it does not go through a grid: write choice")
    if spec.algorithm == "random" and distribution.kind == "grid" and distribution.when:
        raise UserError(
            f"space.{key}: a grid with a condition needs algorithm grid: write choice to draw from its values"
        )


def _check_condition(spec: SearchSpec, key: str, other: str, accepted: tuple[Any, ...]) -> None:
    parent = spec.space.get(other)
    if parent is None:
        return  # a fixed key: the condition holds for all trials or none, and an override may change that
    if not parent.is_list:
        raise UserError(
            f"space.{key}: when: {other} is drawn from a range: a condition needs a list of values"
        )
    if never := [value for value in accepted if value not in parent.values]:
        raise UserError(
            f"space.{key}: when: {other} never is {', '.join(map(repr, never))}: "
            f"its values are {', '.join(map(repr, parent.values))}"
        )


def _live(spec: SearchSpec) -> dict[str, Distribution]:
    """Return the keys that can be set, each after the keys in its conditions; conditions on fixed keys are left out."""
    base = base_config(spec)
    live: dict[str, Distribution] = {}
    for key, held in _ordered(spec).items():
        searched = {other: accepted for other, accepted in held.when.items() if other in spec.space}
        fixed = {other: _value(base, other) for other in held.when if other not in spec.space}
        if searched.keys() <= live.keys() and all(
            value in held.when[other] for other, value in fixed.items()
        ):
            live[key] = held.model_copy(update={"when": searched})
    return live


def _value(base: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(base, section), name)


def _holds(when: Mapping[str, tuple[Any, ...]], sample: Mapping[str, Any]) -> bool:
    return all(sample.get(other, NOT_SET) in accepted for other, accepted in when.items())


def _check_values(spec: SearchSpec) -> None:
    tree = config.recipe_tree(spec.recipe)
    live = _live(spec)
    for key, distribution in live.items():
        for value in distribution.probes():
            try:
                built = _build(spec, tree, _probe(live, key, value))
            except UserError as error:
                raise UserError(f"space.{key}: the value {value!r} is not accepted: {error}") from None
            _check_frozen(spec, built)
    for sample in itertools.islice(_combinations(live), _MOST_COMBINATIONS):
        try:
            _build(spec, tree, sample)
        except UserError as error:
            together = ", ".join(f"{key} {value!r}" for key, value in sample.items())
            raise UserError(f"space: {together} are not accepted together: {error}") from None


def _probe(live: dict[str, Distribution], key: str = "", value: Any = None) -> dict[str, Any]:
    """Return a sample of first values, except that `key` has `value` and its conditions hold."""
    forced = {key: value}
    for child in reversed(live):
        if child in forced:
            forced |= {other: accepted[0] for other, accepted in live[child].when.items()}
    sample: dict[str, Any] = {}
    for name, held in live.items():
        if _holds(held.when, sample):
            sample[name] = forced.get(name, held.probes()[0])
    return sample


def _combinations(live: dict[str, Distribution]) -> Iterator[dict[str, Any]]:
    """Yield a sample for every combination of the keys' probes."""
    samples: Iterator[dict[str, Any]] = iter([{}])
    for key, held in live.items():
        samples = _extend(samples, key, held)
    return samples


def _extend(samples: Iterator[dict[str, Any]], key: str, held: Distribution) -> Iterator[dict[str, Any]]:
    for sample in samples:
        if _holds(held.when, sample):
            yield from ({**sample, key: value} for value in held.probes())
        else:
            yield sample


def count(spec: SearchSpec) -> int:
    """Number of configurations that the search tries, each with every seed."""
    if spec.configurations is not None:
        return len(spec.configurations)
    if spec.algorithm == "grid":
        return sum(1 for _ in _combinations(_live(spec)))
    grids = [len(held.values) for held in spec.space.values() if held.kind == "grid"]
    return (spec.trials or 0) * math.prod(grids)


def check_recorded(spec: SearchSpec, recorded: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the settings that a search has recorded of its trials.

    Args:
        recorded: settings by the names of the files that they stand in.

    Raises:
        UserError: no trial of the search can have had them.
    """
    if spec.configurations is not None:
        listed = [settings_of(each) for each in spec.configurations]
        wrong = {file: "settings are in no configuration of the search" for file in recorded}
        wrong = {file: said for file, said in wrong.items() if recorded[file] not in listed}
    else:
        live, moved = _live(spec), _mutated(spec) if spec.scheduler.name == "pbt" else {}
        wrong = {file: _unlike(live, moved, settings) for file, settings in recorded.items()}
    for file, said in wrong.items():
        if said:
            raise UserError(f"{file}: {said}: restore or remove it")


def _unlike(
    live: dict[str, Distribution], moved: dict[str, Distribution], settings: Mapping[str, Any]
) -> str:
    """Return in what settings differ from all that can be drawn; empty if they do not.

    Args:
        moved: those that population-based training may have moved out of their ranges.
    """
    if others := [key for key in settings if key not in live]:
        return f"the space of the search has no {others[0]}"
    for key, held in live.items():
        if key not in settings:
            if not held.when:
                return f"{key} is missing"
        elif not (
            held.holds(settings[key]) or (key in moved and not held.is_list and is_number(settings[key]))
        ):
            return f"{key} {settings[key]!r} is not in the space of the search"
    return ""


def to_ray(spec: SearchSpec) -> dict[str, Any]:
    """Convert the space to Ray Tune's form, for the algorithms `random` and `grid`.

    A key whose condition does not hold is drawn as `NOT_SET`. `BasicVariantGenerator` needs the search's seed.
    """
    from ray import tune

    drawn = {key: (held.when, _domain(spec, held)) for key, held in _live(spec).items()}
    return {
        key: tune.sample_from(partial(_draw, when, domain)) if when else domain
        for key, (when, domain) in drawn.items()
    }


def _domain(spec: SearchSpec, held: Distribution) -> Any:
    from ray import tune

    if held.is_list:
        each = spec.algorithm == "grid" or held.kind == "grid"
        return tune.grid_search(list(held.values)) if each else tune.choice(list(held.values))
    low, high = held.values
    match held.kind:
        case "uniform":
            return tune.uniform(low, high)
        case "loguniform":
            return tune.loguniform(low, high)
        case "int":
            return tune.randint(low, high + 1)  # Ray excludes the upper end
        case _:
            return tune.lograndint(low, high + 1)


def _draw(when: Mapping[str, tuple[Any, ...]], domain: Any, variant: Mapping[str, Any]) -> Any:
    """Return what replaces a conditional key: `NOT_SET`, or its domain, from which Ray then draws with its own seed."""
    from ray import tune
    from ray.tune.search.sample import Domain

    drawn = {other: variant["config"][other] for other in when}
    if any(isinstance(value, Domain | dict) for value in drawn.values()):
        return tune.sample_from(partial(_draw, when, domain))  # again, after Ray has drawn the other keys
    return domain if _holds(when, drawn) else NOT_SET


def to_optuna(spec: SearchSpec) -> Callable[[Any], dict[str, Any]]:
    """Convert the space to the define-by-run function that Ray's `OptunaSearch` takes, for the algorithm `optuna`."""
    return partial(_suggest, _live(spec))


def _suggest(live: dict[str, Distribution], trial: Any) -> dict[str, Any]:
    sample: dict[str, Any] = {}
    for key, held in live.items():
        if not _holds(held.when, sample):
            continue
        if held.is_list:
            # as text, because Optuna chooses between scalars only, and train.betas is a list
            texts = {json.dumps(value): value for value in held.values}
            sample[key] = texts[trial.suggest_categorical(key, list(texts))]
        else:
            suggest = trial.suggest_int if held.kind in ("int", "logint") else trial.suggest_float
            sample[key] = suggest(key, *held.values, log=held.kind in ("loguniform", "logint"))
    return sample


def mutations(spec: SearchSpec) -> dict[str, Any]:
    """Return the keys that population-based training changes while trials run, as its scheduler takes them: keys of
    `train.` that can change when a run resumes and have no condition. All others are copied with the better trial."""
    return {
        key: list(held.values) if held.is_list else _domain(spec, held)
        for key, held in _mutated(spec).items()
    }


def within(spec: SearchSpec, sample: dict[str, Any]) -> dict[str, Any]:
    """Return the sample with values that population-based training moved out of their range set to the range's end."""
    ranges = {key: held.values for key, held in _mutated(spec).items() if not held.is_list}
    return sample | {key: min(max(sample[key], low), high) for key, (low, high) in ranges.items()}


def _mutated(spec: SearchSpec) -> dict[str, Distribution]:
    return {
        key: held
        for key, held in _live(spec).items()
        if key.startswith("train.") and key not in _FIXED_ONCE_STARTED and not held.when
    }
