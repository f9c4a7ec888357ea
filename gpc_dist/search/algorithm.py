"""The parts of Ray Tune that a search uses: samples, searcher, scheduler and stop rules."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ray import tune
from ray.tune import Callback, stopper
from ray.tune.experiment import Experiment
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, Repeater, SearchAlgorithm, Searcher

from gpc_dist import files
from gpc_dist.errors import UserError
from gpc_dist.runs.folder import SearchFolder
from gpc_dist.search import space
from gpc_dist.search.generators import Suggestions, Variants
from gpc_dist.search.pack_key import grouped, pack_key
from gpc_dist.search.past import SPENT, Past, read_spent_s, spent_file
from gpc_dist.search.spec import SearchSpec
from gpc_dist.search.trial import NAME, SAMPLE, SEED, STEP
from gpc_dist.search.trial_files import name_among

_LAST_STEP = 10**9
"""Upper bound of a run's steps, for schedulers that require one."""
_NOTE_S = 10.0


def param_space(spec: SearchSpec, past: Past) -> dict[str, Any]:
    """Return the space that Ray Tune draws trials from. A searcher (Optuna) draws its samples itself.

    Trials that have begun get what is recorded of them: population-based training may have changed what was drawn.
    """
    return {} if spec.algorithm == "optuna" else {SAMPLE: tune.grid_search(_samples(spec, past))}


def joint_space(searches: Mapping[str, tuple[SearchSpec, Past]]) -> tuple[dict[str, Any], Past]:
    """Return the trials of searches that list their configurations as one space, and those of them that have begun, by
    their places in it. Trials that can share a pack stand one after the other.

    The evaluations of those that have begun are left out: values of different tasks are not compared.
    """
    keyed = []
    for name, (spec, past) in searches.items():
        for number, sample in enumerate(_samples(spec, past)):
            key = pack_key(space.trial_config(spec, sample))
            keyed.append((key, (sample | {NAME: name_among(name, number)}, past.get(number))))
    ordered = [trial for group in grouped(keyed) for trial in group]
    begun = {
        place: replace(trial, evaluations=()) for place, (_, trial) in enumerate(ordered) if trial is not None
    }
    return {SAMPLE: tune.grid_search([sample for sample, _ in ordered])}, begun


def _samples(spec: SearchSpec, past: Past) -> list[dict[str, Any]]:
    """Return the drawn values of each trial, and its seed."""
    samples = [sample | {SEED: seed} for sample in draw(spec) for seed in spec.seeds]
    for number, trial in past.items():
        record, drawn = trial.record, samples[number]
        recorded = {key: record.settings.get(key, space.NOT_SET) for key in drawn}
        samples[number] = recorded | {SEED: drawn[SEED] if record.seed is None else record.seed}
    return samples


def draw(spec: SearchSpec) -> list[dict[str, Any]]:
    """Return the configurations of a random or grid search; each is run with every seed.

    Ray Tune draws them here, once: it would draw conditional keys again for each seed. Configurations that the search
    lists are returned with all keys in each, because Tune's table needs them.
    """
    if spec.configurations is not None:
        return [dict.fromkeys(spec.tried_keys, space.NOT_SET) | each for each in spec.configurations]
    generator = BasicVariantGenerator(random_state=spec.seed)
    with TemporaryDirectory() as folder:  # an experiment makes its folder, by default in the user's home
        drawn = Experiment(
            "draw",
            run=lambda _: None,
            config=space.to_ray(spec),
            num_samples=spec.trials or 1,
            storage_path=folder,
        )
    generator.add_configurations([drawn])
    found = []
    while (trial := generator.next_trial()) is not None:
        found.append(trial.config)
    return found


def samples(spec: SearchSpec) -> int:
    """Number of samples that Ray Tune draws from `param_space`."""
    return trials(spec) if spec.algorithm == "optuna" else 1


def trials(spec: SearchSpec) -> int:
    """Number of trials of a search: configurations times seeds."""
    configurations = (spec.trials or 1) if spec.algorithm == "optuna" else len(draw(spec))
    return configurations * len(spec.seeds)


def searcher(spec: SearchSpec, metric: str, mode: str, concurrent: int, past: Past) -> SearchAlgorithm:
    """Return the part of Ray Tune that chooses the next trials: first those that have begun, then new ones.

    Raises:
        UserError: the algorithm needs a package that is not installed.
    """
    if spec.algorithm != "optuna":
        return Variants(past, metric, concurrent)
    try:
        from ray.tune.search.optuna import OptunaSearch

        from gpc_dist.search.sampler import Sampler
    except ImportError:
        raise UserError("algorithm 'optuna' needs the extra: pip install 'gpc-dist[optuna]'") from None
    sampler, seeds = Sampler(spec.seed, past, len(spec.seeds)), len(spec.seeds)
    found: Searcher = OptunaSearch(space.to_optuna(spec), metric=metric, mode=mode, sampler=sampler)
    repeated = Repeater(found, repeat=seeds) if seeds > 1 else found
    return Suggestions(past, metric, concurrent, ConcurrencyLimiter(repeated, concurrent))


def make_scheduler(spec: SearchSpec) -> TrialScheduler:
    """Return Ray Tune's scheduler; its unit of time is the optimizer step."""
    wanted = spec.scheduler
    match wanted.name:
        case "asha":
            return ASHAScheduler(
                time_attr=STEP,
                max_t=_LAST_STEP,
                grace_period=wanted.grace_steps or 1,
                reduction_factor=wanted.reduction_factor,
                brackets=wanted.brackets,
            )
        case "median":
            return MedianStoppingRule(time_attr=STEP, grace_period=wanted.grace_steps or 1)
        case "pbt":
            return PopulationBasedTraining(
                time_attr=STEP,
                perturbation_interval=wanted.perturb_every or 1,
                hyperparam_mutations={SAMPLE: space.mutations(spec)},
                quantile_fraction=wanted.quantile_fraction,
                resample_probability=wanted.resample_probability,
                log_config=False,
            )
    return FIFOScheduler()


def stop_rules(spec: SearchSpec, metric: str, mode: str, folder: SearchFolder) -> list[stopper.Stopper]:
    """Return the rules that end a whole search early. Ray Tune needs those that are callbacks too as both."""
    rules: list[stopper.Stopper] = []
    if spec.stop.max_s is not None:
        rules.append(_Timeout(spec.stop.max_s, read_spent_s(folder), spent_file(folder)))
    if spec.stop.threshold is not None:
        rules.append(_Threshold(metric, mode, spec.stop.threshold))
    if spec.stop.patience is not None:
        rules.append(_Patience(metric, mode, spec.stop.patience))
    return rules


class _Timeout(stopper.Stopper):
    """Ends the search after a time, which all its starts share: what is spent stands in a file."""

    def __init__(self, limit_s: float, spent_s: float, file: Path):
        self._limit_s, self._file = limit_s, file
        self._spent_s = self._noted_s = spent_s
        self._last_s: float | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        now_s = time.monotonic()
        self._spent_s += now_s - (self._last_s or now_s)
        self._last_s = now_s
        over = self._spent_s >= self._limit_s
        if over or self._spent_s - self._noted_s >= _NOTE_S:
            files.write_json(self._file, {SPENT: self._spent_s})
            self._noted_s = self._spent_s
        return over


class _Threshold(stopper.Stopper):
    """Ends the search when the metric reaches a value."""

    def __init__(self, metric: str, mode: str, value: float):
        self._metric, self._sign, self._value = metric, 1 if mode == "max" else -1, value
        self._reached = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self._reached = self._reached or self._sign * (result[self._metric] - self._value) >= 0
        return self._reached

    def stop_all(self) -> bool:
        return self._reached


class _Patience(stopper.Stopper, Callback):
    """Ends the search after a number of trials in a row that have ended without a new best value.

    Ray Tune's own `ExperimentPlateauStopper` counts evaluations, and looks at the spread of the best ones.
    """

    def __init__(self, metric: str, mode: str, patience: int):
        self._metric, self._sign, self._patience = metric, 1 if mode == "max" else -1, patience
        self._best = -math.inf
        self._best_trial = ""
        self._ended = 0

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        value = self._sign * result[self._metric]
        if value > self._best:
            self._best, self._best_trial, self._ended = value, trial_id, 0
        return False

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended += trial.trial_id != self._best_trial

    def stop_all(self) -> bool:
        return self._ended >= self._patience
