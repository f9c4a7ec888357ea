"""The loss and the outputs of each example, from the head's outputs, for each kind of task."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gpc_dist.tasks import Batch
from gpc_dist.tasks.example import Kind


def summed_loss(kind: Kind, outputs: Tensor, batch: Batch) -> Tensor:
    """Loss summed over the examples of a batch, a float32 scalar.

    Cross-entropy for a classification, squared error for a regression. For a choice, the negative log of the
    right candidates' total probability under the softmax over the example's candidates.

    Args:
        outputs: `[R, outputs]` of the batch's rows.
    """
    assert batch.targets is not None
    if kind == "classification":
        return F.cross_entropy(outputs, batch.targets, reduction="sum")
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
