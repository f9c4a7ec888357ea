"""Tasks: their text, their metrics, and which examples make up a step.

`make_task` gives the task of a configuration; `read_part` its examples, `encode` their tokens,
`EpochPlan` the steps, `share` a rank's part of a step and `collate` the tensors of that part.
"""

from __future__ import annotations

from gpc_dist.config import DataConfig, TaskConfig
from gpc_dist.errors import UserError
from gpc_dist.tasks.batching import EpochPlan, Sizes, evaluation_batches, share
from gpc_dist.tasks.collate import Batch, LaneBatch, collate, merge_lanes
from gpc_dist.tasks.encode import Encoded, encode, one_text
from gpc_dist.tasks.example import Example
from gpc_dist.tasks.holdout import read_part, selection_part
from gpc_dist.tasks.packaged import NAMES, answered_by, make_packaged_task
from gpc_dist.tasks.submission import file_name, submission, write_predictions
from gpc_dist.tasks.table import make_table_task
from gpc_dist.tasks.task import Prediction, Task

__all__ = [
    "Batch",
    "Encoded",
    "EpochPlan",
    "Example",
    "LaneBatch",
    "Prediction",
    "Sizes",
    "Task",
    "answered_by",
    "collate",
    "encode",
    "evaluation_batches",
    "file_name",
    "make_task",
    "merge_lanes",
    "one_text",
    "read_part",
    "selection_part",
    "share",
    "submission",
    "write_predictions",
]


def make_task(task: TaskConfig, data: DataConfig) -> Task:
    """The task that the configuration names (packaged) or describes (a table).

    Raises:
        UserError: neither a packaged name nor a complete description, or a table whose labels are
            not given and whose training split cannot be read.
    """
    described = task.text or task.choices
    if task.name in NAMES:
        if described or task.labels:
            raise UserError(
                f"'{task.name}' is a packaged task, but task.text, task.choices or task.labels "
                "describe a table: give the table another task.name"
            )
        return make_packaged_task(task.name, data, task.metric)
    if not described:
        raise UserError(
            f"unknown task '{task.name}': use a packaged one ({', '.join(NAMES)}), or describe a "
            "table by task.text (its text columns) and task.label (its label column)"
        )
    return make_table_task(task, data)
