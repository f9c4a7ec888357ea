"""What an adapter says of its task: enough to evaluate and predict without its run's folder."""

from __future__ import annotations

from typing import Any

from gpc_dist.training.session import Session


def task_card(session: Session) -> dict[str, Any]:
    """The `task` entry of an adapter's card; `inference.adapter_config` reads it."""
    config, task = session.config.dump(), session.task
    if session.config.task.text or session.config.task.choices:
        # a table's labels must not depend on finding its training split again
        config["task"]["labels"] = list(task.labels) or None
    return {"task": config["task"], "data": config["data"]}
