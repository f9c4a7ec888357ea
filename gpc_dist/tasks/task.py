"""A task: how a split is read, how outputs become predictions, how predictions are scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpc_dist.errors import UserError
from gpc_dist.tasks.example import Example, Kind, Split
from gpc_dist.tasks.formats import Row
from gpc_dist.tasks.metrics import LOWER_IS_BETTER, Metric, class_scores, confusion_matrix


@dataclass(frozen=True)
class Prediction:
    """The prediction for one example."""

    id: Any
    value: str | int | float
    """The label (classification), the number of the chosen candidate, or the number itself."""
    probabilities: Mapping[str, float] | None
    """Of every label, or of every candidate by its number, in order; None for regression."""


@dataclass(frozen=True)
class Task:
    """A task to learn. `outputs` in its methods has one array per example, as the head computes it:
    class logits `[C]`, candidate scores `[candidates]`, or the predicted number `[1]`."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    """Label names by class index; empty unless the task is a classification."""
    label_words: tuple[str, ...]
    """The labels as ordinary words, from which a prompt can start; may be empty."""
    metrics: Mapping[str, Metric]
    """Metrics by name, in the order they are reported."""
    main_metric: str
    """The metric that selects the best checkpoint: one of `metric_names`."""
    columns: tuple[str, ...]
    """Columns of a source row that a prediction needs."""
    reader: Callable[[Split], list[Example]]
    """Reads a split; called by `read`."""
    parser: Callable[[list[Row]], list[Example]]
    """Makes examples of rows without labels; called by `parse`."""
    averaged: bool = False
    """Report the mean of the metrics as `average`: SuperGLUE's score of a task with two metrics."""

    def __post_init__(self) -> None:
        if self.main_metric not in self.metric_names:
            raise UserError(
                f"task {self.name} has no metric '{self.main_metric}': "
                f"set task.metric to one of {', '.join(self.metric_names)}"
            )

    @property
    def outputs(self) -> int:
        """Outputs of the head per row."""
        return len(self.labels) if self.kind == "classification" else 1

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*self.metrics, "average") if self.averaged else tuple(self.metrics)

    @property
    def greater_is_better(self) -> bool:
        """Direction of the main metric."""
        return self.main_metric not in LOWER_IS_BETTER

    def read(self, split: Split) -> list[Example]:
        """The examples of a split; those of `test` have no targets, whatever stands in its label column.

        Raises:
            UserError: the split cannot be found or read, is empty, or lacks labels it must have.
        """
        examples = self.reader(split)
        if split != "test":
            _require_targets(examples, f"the {split} split of task {self.name}")
        return examples

    def parse(self, rows: list[Row]) -> list[Example]:
        """The examples of source rows that are not from a split; labels are ignored.

        Raises:
            UserError: a row lacks a column the task reads.
        """
        return self.parser(rows)

    def score(self, examples: Sequence[Example], outputs: Sequence[np.ndarray]) -> dict[str, float]:
        """Every metric of the outputs; raises `UserError` if an example has no target."""
        _require_targets(examples, f"task {self.name}: what is to be scored")
        decisions = self.decide(outputs)
        scores = {name: metric(examples, decisions) for name, metric in self.metrics.items()}
        if self.averaged:
            scores["average"] = sum(scores.values()) / len(scores)
        return scores

    def measure(self, examples: Sequence[Example], outputs: Sequence[np.ndarray]) -> dict[str, float]:
        """The results of an evaluation: every metric, and the `loss`."""
        return self.score(examples, outputs) | {"loss": self.loss(examples, outputs)}

    def confusion(self, examples: Sequence[Example], outputs: Sequence[np.ndarray]) -> list[list[int]] | None:
        """Numbers of examples by their label (row) and the predicted label (column), both in the order of `labels`;
        None unless the task is a classification. Raises `UserError` as `score`."""
        if self.kind != "classification":
            return None
        _require_targets(examples, f"task {self.name}: what is to be scored")
        found: list[list[int]] = confusion_matrix(examples, self.decide(outputs), len(self.labels)).tolist()
        return found

    def by_class(self, confusion: list[list[int]] | None) -> dict[str, Any]:
        """What a result says about the classes: `per_class` (precision, recall, F1 and number of examples by label) and
        `confusion_matrix` (`labels`, and the `counts` that `confusion` gave); nothing for None."""
        if confusion is None:
            return {}
        scores = class_scores(np.array(confusion))
        return {
            "per_class": dict(zip(self.labels, scores, strict=True)),
            "confusion_matrix": {"labels": list(self.labels), "counts": confusion},
        }

    def loss(self, examples: Sequence[Example], outputs: Sequence[np.ndarray]) -> float:
        """The training loss, averaged over the examples: the negative log-likelihood of the right class or candidates
        under the softmax, or the squared error of the number. Raises `UserError` as `score`."""
        _require_targets(examples, f"task {self.name}: what is to be scored")
        return float(np.mean([self._loss(*pair) for pair in zip(examples, outputs, strict=True)]))

    def _loss(self, example: Example, output: np.ndarray) -> float:
        if self.kind == "regression":
            target: Any = example.target
            return (float(output[0]) - target) ** 2
        logits = output.astype(np.float64)
        right = logits[list(_right_indices(example))]
        return float(np.logaddexp.reduce(logits) - np.logaddexp.reduce(right))

    def metrics_of(self, name: str) -> tuple[Metric, ...]:
        """The metrics whose mean is reported as `name`."""
        return tuple(self.metrics.values()) if name == "average" else (self.metrics[name],)

    def predictions(self, examples: Sequence[Example], outputs: Sequence[np.ndarray]) -> list[Prediction]:
        decisions = self.decide(outputs)
        if self.kind == "regression":
            return [
                Prediction(example.id, float(number), None)
                for example, number in zip(examples, decisions, strict=True)
            ]
        return [
            Prediction(
                example.id,
                self.labels[index] if self.kind == "classification" else int(index),
                dict(zip(self.labels or map(str, range(len(output))), _softmax(output), strict=True)),
            )
            for example, index, output in zip(examples, decisions, outputs, strict=True)
        ]

    def majority_baseline(self, train: Sequence[Example], validation: Sequence[Example]) -> dict[str, float]:
        """Scores on `validation` of a constant prediction: the most frequent class or candidate position of
        `train`, or the mean of its numbers."""
        if self.kind == "regression":
            mean = np.mean(np.array([example.target for example in train]))
            return self.score(validation, [np.array([mean])] * len(validation))
        counts = Counter(index for example in train for index in _right_indices(example))
        winner = min(counts, key=lambda index: (-counts[index], index))
        sizes = (self.outputs if self.kind == "classification" else len(e.rows) for e in validation)
        return self.score(validation, [np.arange(size) == min(winner, size - 1) for size in sizes])

    def decide(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """The decisions: class or candidate indices, int64 `[N]`, or for regression numbers, float64 `[N]`."""
        if self.kind == "regression":
            return np.array([float(output[0]) for output in outputs])
        return np.array([int(np.argmax(output)) for output in outputs])


def _require_targets(examples: Sequence[Example], what: str) -> None:
    for example in examples:
        if example.target is None:
            raise UserError(f"{what} has no label at example {example.id}: every one needs a label")


def _right_indices(example: Example) -> tuple[int, ...]:
    target: Any = example.target
    return target if isinstance(target, tuple) else (target,)


def _softmax(logits: np.ndarray) -> list[float]:
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    return (shifted / shifted.sum()).tolist()  # type: ignore[no-any-return]
