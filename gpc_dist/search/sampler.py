"""Optuna's sampler for a search that goes on. Imports Optuna, an extra: import it where it is used."""

from __future__ import annotations

import json
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from gpc_dist.search.past import Past


class Sampler(TPESampler):
    """TPE; a configuration that has been tried gets its recorded values.

    A value is drawn for it all the same: new configurations get the draws that follow, not those of the first ones.

    Args:
        past: the trials that have begun; consecutive ones have the same configuration with different seeds.
        seeds: number of seeds of each configuration.
    """

    def __init__(self, seed: int, past: Past, seeds: int):
        super().__init__(seed=seed)
        self._recorded = {number // seeds: trial.record.settings for number, trial in past.items()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        drawn = super().sample_independent(study, trial, param_name, param_distribution)
        recorded = self._recorded.get(trial.number, {})
        if param_name not in recorded:
            return drawn
        value = recorded[param_name]
        # see `space.to_optuna`
        return json.dumps(value) if isinstance(param_distribution, CategoricalDistribution) else value
