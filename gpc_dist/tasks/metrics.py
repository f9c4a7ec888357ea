"""Metrics of the packaged tasks and of user tables.

Every metric takes examples (with targets) and decisions `[N]` (for each example the chosen class or
candidate index, or the predicted number) and returns a float. scikit-learn and SciPy are imported on use.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from gpc_dist.tasks.example import Example, Kind

Metric = Callable[[Sequence[Example], np.ndarray], float]

LOWER_IS_BETTER = frozenset({"loss", "rmse"})
"""Metrics of which smaller values are better; of all others greater ones are."""


def _targets(examples: Sequence[Example]) -> np.ndarray:
    return np.array([example.target for example in examples])


def _is_right(example: Example, decision: int) -> bool:
    if isinstance(example.target, tuple):
        return decision in example.target
    return decision == example.target


def accuracy(examples: Sequence[Example], decisions: np.ndarray) -> float:
    """Share of right classes, or of choices that are among the right candidates."""
    return float(np.mean([_is_right(e, d) for e, d in zip(examples, decisions, strict=True)]))


def f1_macro(examples: Sequence[Example], decisions: np.ndarray) -> float:
    """Unweighted mean of the F1 of the classes that occur, as SuperGLUE computes it for CB."""
    from sklearn.metrics import f1_score

    return float(f1_score(_targets(examples), decisions, average="macro", zero_division=0))


def matthews(examples: Sequence[Example], decisions: np.ndarray) -> float:
    """Matthews correlation; 0 where it is undefined."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(_targets(examples), decisions))


def pearson(examples: Sequence[Example], decisions: np.ndarray) -> float:
    """Pearson correlation; 0 where it is undefined (one side is constant)."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, _targets(examples), decisions)


def spearman(examples: Sequence[Example], decisions: np.ndarray) -> float:
    """Spearman rank correlation; 0 where it is undefined (one side is constant)."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, _targets(examples), decisions)


def _correlation(function: Callable[..., object], x: np.ndarray, y: np.ndarray) -> float:
    # a constant has no correlation with anything; SciPy would warn and give NaN, which is not JSON
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(function(x, y).statistic)  # type: ignore[attr-defined]


def rmse(examples: Sequence[Example], decisions: np.ndarray) -> float:
    """Root of the mean squared error."""
    return float(np.sqrt(np.mean((_targets(examples) - decisions) ** 2)))


def multirc_f1(examples: Sequence[Example], decisions: np.ndarray) -> float:
    """MultiRC's F1a: F1 of the class `true` over all answers of all questions."""
    from sklearn.metrics import f1_score

    return float(f1_score(_targets(examples), decisions, zero_division=0))


def multirc_exact_match(examples: Sequence[Example], decisions: np.ndarray) -> float:
    """Share of questions (groups) with a right decision on every answer."""
    whole: dict[object, bool] = {}
    for example, decision in zip(examples, decisions, strict=True):
        whole[example.group] = whole.get(example.group, True) and _is_right(example, decision)
    return float(np.mean(list(whole.values())))


def gender_parity(examples: Sequence[Example], decisions: np.ndarray) -> float:
    """AX-g's gender parity: share of the pairs (groups of two), which differ in a pronoun's gender alone, with the same
    decision on both; 0 without a pair."""
    decided: dict[object, list[int]] = {}
    for example, decision in zip(examples, decisions, strict=True):
        decided.setdefault(example.group, []).append(int(decision))
    pairs = [pair for pair in decided.values() if len(pair) == 2]
    return float(np.mean([one == other for one, other in pairs])) if pairs else 0.0


def record_f1(examples: Sequence[Example], decisions: np.ndarray) -> float:
    """Mean of the token F1 between the chosen entity and the gold answer nearest to it."""
    return _best_over_answers(_token_f1, examples, decisions)


def record_exact_match(examples: Sequence[Example], decisions: np.ndarray) -> float:
    """Share of chosen entities equal to a gold answer, both normalised."""
    return _best_over_answers(lambda a, b: float(a == b), examples, decisions)


def _best_over_answers(
    similarity: Callable[[str, str], float], examples: Sequence[Example], decisions: np.ndarray
) -> float:
    best = []
    for example, decision in zip(examples, decisions, strict=True):
        chosen = normalize_answer(example.meta["candidates"][decision])
        answers = example.meta["answers"]
        best.append(max(similarity(chosen, normalize_answer(answer)) for answer in answers))
    return float(np.mean(best))


def normalize_answer(text: str) -> str:
    """SQuAD's normal form (Rajpurkar et al., 2016), which ReCoRD uses: lower case, no punctuation,
    no articles, single spaces."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _token_f1(prediction: str, answer: str) -> float:
    predicted, wanted = prediction.split(), answer.split()
    common = sum((Counter(predicted) & Counter(wanted)).values())
    # 2PR / (P + R) with P = common / |predicted|, R = common / |wanted|
    return 2 * common / (len(predicted) + len(wanted)) if common else 0.0


def confusion_matrix(examples: Sequence[Example], decisions: np.ndarray, classes: int) -> np.ndarray:
    """Numbers of examples by their class (row) and the decision (column), int64 `[C, C]`."""
    from sklearn.metrics import confusion_matrix as count

    found: np.ndarray = count(_targets(examples), decisions, labels=range(classes))
    return found


def class_scores(confusion: np.ndarray) -> list[dict[str, float]]:
    """Precision, recall, F1 and the number of examples of each class of a confusion matrix `[C, C]`. A score without
    examples or decisions is 0."""
    right, decided, there = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    return [
        {
            "precision": float(r / max(d, 1)),
            "recall": float(r / max(t, 1)),
            "f1": float(2 * r / max(d + t, 1)),
            "examples": int(t),
        }
        for r, d, t in zip(right, decided, there, strict=True)
    ]


TABLE_METRICS: dict[Kind, dict[str, Metric]] = {
    "classification": {"accuracy": accuracy, "f1_macro": f1_macro, "matthews": matthews},
    "choice": {"accuracy": accuracy},
    "regression": {"pearson": pearson, "spearman": spearman, "rmse": rmse},
}
"""Metrics of a user table; the first one is its main metric unless `task.metric` names another."""
