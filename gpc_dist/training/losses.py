"""The loss and the outputs of each example, from the head's outputs, for each kind of task."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gpc_dist.config import TrainConfig
from gpc_dist.errors import UserError
from gpc_dist.tasks import Batch, Task
from gpc_dist.tasks.example import Kind


def check_class_weights(config: TrainConfig, task: Task) -> None:
    """Raise `UserError` if the loss of a task without classes is to be weighted by class."""
    if config.class_weights != "none" and task.kind != "classification":
        raise UserError(
            f"train.class_weights '{config.class_weights}' needs a classification, and task {task.name} is of kind "
            f"{task.kind}: leave it out"
        )


def class_weights(config: TrainConfig, targets: np.ndarray, classes: int) -> Tensor | None:
    """Weight of each class in the loss, float32 `[C]`, 0 for a class without examples; None for equal weights.

    Args:
        targets: classes of all training examples, int64 `[N]`.
    """
    if config.class_weights == "none":
        return None
    counts = np.bincount(targets, minlength=classes)
    weights = np.where(counts > 0, len(targets) / (np.count_nonzero(counts) * counts.clip(1)), 0)
    return torch.tensor(weights, dtype=torch.float32)


def summed_loss(kind: Kind, outputs: Tensor, batch: Batch, weights: Tensor | None = None) -> Tensor:
    """Loss summed over the examples of a batch, a float32 scalar.

    Cross-entropy for a classification, squared error for a regression. For a choice, the negative log of the
    right candidates' total probability under the softmax over the example's candidates.

    Args:
        outputs: `[R, outputs]` of the batch's rows.
        weights: of each class, `[C]`, by which the losses of its examples are multiplied.
    """
    assert batch.targets is not None
    if kind == "classification":
        weights = None if weights is None else weights.to(outputs.dtype)
        return F.cross_entropy(outputs, batch.targets, weight=weights, reduction="sum")
    if kind == "regression":
        return F.mse_loss(outputs.squeeze(1), batch.targets, reduction="sum")
    # padding the candidates with -inf keeps the softmax one call for the whole batch
    scores = _by_example(outputs.squeeze(1), batch, -torch.inf)
    right = _by_example(batch.targets.to(outputs.dtype), batch, 0.0).bool()
    total = torch.logsumexp(scores, dim=1)
    return (total - torch.logsumexp(scores.masked_fill(~right, -torch.inf), dim=1)).sum()


def _by_example(rows: Tensor, batch: Batch, padding: float) -> Tensor:
    """Arrange the values of the rows, `[R]`, in a padded table, `[B, largest number of candidates]`."""
    parts = rows.split(batch.rows_per_example)
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=padding)


def split_outputs(outputs: Tensor, batch: Batch) -> list[np.ndarray]:
    """Outputs of each example as `Task.score` takes them, float32: `[C]`, `[candidates]` or `[1]`."""
    values = outputs.detach().float().cpu().numpy()
    edges = np.cumsum(batch.rows_per_example)[:-1]
    return [part.reshape(-1) for part in np.split(values, edges)]
