"""How much the metric depends on each setting: permutation importance in a random forest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpc_dist.reports.comparison import Comparison
from gpc_dist.reports.scales import scale_of

if TYPE_CHECKING:
    import numpy as np

FEWEST = 8
"""Fewest configurations from which a forest can learn."""

_FOLDS = 4
_SPLITS = 5
_TREES = 50
_SHUFFLES = 10


@dataclass(frozen=True)
class Importance:
    """Importance of the settings of a comparison, by a forest."""

    settings: list[tuple[str, float, float]]
    """Dotted key, importance and its standard deviation over splits; the greatest first. Importance, in the
    metric's unit, is the increase of the forest's mean absolute error on unseen configurations when the
    setting's value is replaced by another configuration's."""
    explained: float
    """Share of the metric's variance that the forest explains in unseen configurations (R²); 0 or less if
    it does no better than their mean."""


def importance(comparison: Comparison) -> Importance | str:
    """The importance of each varied setting, or a sentence that says why there is none."""
    ranked = comparison.ranked
    if len(ranked) < FEWEST:
        return f"Too few configurations: {len(ranked)} have a value, and fewer than {FEWEST} tell nothing reliable."
    if len({configuration.mean for configuration in ranked}) == 1:
        return f"All configurations have the same {comparison.metric}: there is nothing to explain."

    import numpy as np
    from sklearn.metrics import r2_score

    keys = list(comparison.varied)
    features = np.column_stack([scale_of([c.settings.get(key) for c in ranked]).positions for key in keys])
    values = np.array([c.mean for c in ranked])
    splits = [_split(features, values, number) for number in range(_SPLITS)]
    each = np.array([added for added, _ in splits])  # [splits, settings]
    found = zip(keys, each.mean(axis=0).tolist(), each.std(axis=0).tolist(), strict=True)
    explained = float(r2_score(values, np.mean([predicted for _, predicted in splits], axis=0)))
    return Importance(sorted(found, key=lambda entry: -entry[1]), explained)


def _split(features: np.ndarray, values: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Cross-validation: a forest for each part of the configurations, trained on the others.

    Returns:
        The mean absolute error that shuffling adds, `[settings]`, and the predictions without shuffling,
        `[configurations]`; float64.
    """
    import numpy as np
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.model_selection import KFold

    count, settings = features.shape
    draw = np.random.default_rng(number)
    predicted, added = np.empty(count), np.zeros(settings)
    for seen, unseen in KFold(_FOLDS, shuffle=True, random_state=number).split(features):
        forest = RandomForestRegressor(_TREES, random_state=number).fit(features[seen], values[seen])
        predicted[unseen] = forest.predict(features[unseen])
        error = np.abs(predicted[unseen] - values[unseen])
        # scikit-learn's own function shuffles within the part: with two in it, half of the shuffles change nothing
        shuffled = np.tile(features[unseen], (settings, _SHUFFLES, 1, 1))
        for setting in range(settings):
            others = draw.choice(features[:, setting], size=shuffled.shape[1:3])
            shuffled[setting, :, :, setting] = others
        guesses = forest.predict(shuffled.reshape(-1, settings)).reshape(shuffled.shape[:3])
        added += (np.abs(guesses - values[unseen]).mean(axis=1) - error).sum(axis=1)
    return added / count, predicted
