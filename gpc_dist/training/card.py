"""What an adapter says of its task, and how a task is made from that again."""

from __future__ import annotations

from typing import Any

from gpc_dist.adapter.store import AdapterCard
from gpc_dist.config import Config, DataConfig, TaskConfig
from gpc_dist.tasks import Task, make_task
from gpc_dist.training.session import Session


def task_card(session: Session) -> dict[str, Any]:
    """The `task` entry of an adapter's card: enough to evaluate and predict without the run's folder."""
    return describe(session.config, session.task, session.text_tokens)


def describe(config: Config, task: Task, text_tokens: int) -> dict[str, Any]:
    values = config.dump()
    table = bool(config.task.text or config.task.choices)
    return {
        # the labels a table was trained with must not depend on finding its training split again
        "task": values["task"] | ({"labels": list(task.labels)} if table and task.labels else {}),
        "data": values["data"],
        "text_tokens": text_tokens,
    }


def configs(card: AdapterCard) -> tuple[TaskConfig, DataConfig]:
    """The task and data sections an adapter was trained with."""
    return (
        TaskConfig.model_validate(card.task["task"]),
        DataConfig.model_validate(card.task["data"]),
    )


def task_of(card: AdapterCard, data: DataConfig) -> Task:
    """The adapter's task, reading its splits from `data`."""
    return make_task(configs(card)[0], data)
