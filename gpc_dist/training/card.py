"""What an adapter says of its task: enough to evaluate and predict without its run's folder."""

from __future__ import annotations

from typing import Any

from gpc_dist.config import Config
from gpc_dist.tasks import Task


def task_card(config: Config, task: Task) -> dict[str, Any]:
    """The `task` entry of an adapter's card; `inference.adapter_config` reads it."""
    values = config.dump()
    if config.task.text or config.task.choices:
        # a table's labels must not depend on finding its training split again
        values["task"]["labels"] = list(task.labels) or None
    return {"task": values["task"], "data": values["data"]}
