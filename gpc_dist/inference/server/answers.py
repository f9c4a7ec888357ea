"""The JSON that clients send and get, as the OpenAPI page describes it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gpc_dist.errors import UserError
from gpc_dist.inference.server.catalog import Held
from gpc_dist.parsing import DEEPEST, parse_json
from gpc_dist.tasks import Prediction, Task

RowGiven = dict[str, Any] | str


class Asked(BaseModel):
    """Rows to predict: objects with the task's columns, or texts if it reads one column."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"rows": [{"text": "a fine film"}]}]}
    )

    # the first wrong row is told, and a request has room for half a million
    rows: list[RowGiven] | None = Field(None, fail_fast=True)
    row: RowGiven | None = None
    """For one row, in place of `rows`."""

    @model_validator(mode="after")
    def _check(self) -> Asked:
        if (self.rows is None) == (self.row is None):
            raise ValueError("give either rows or row")
        return self

    @classmethod
    def parse(cls, body: bytes) -> Asked:
        """The body of a request.

        Raises:
            UserError: it is no JSON of this form.
        """
        try:
            return cls.model_validate(_flat(parse_json(body, "the request")))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(
                f"the request is not valid: {f'{where}: ' if where else ''}{first['msg']}"
            ) from None

    def of(self, task: Task) -> list[Mapping[str, Any]]:
        """The rows with the columns of a task.

        Raises:
            UserError: there is none; or one is a text, and the task reads several columns.
        """
        given = [self.row] if self.row is not None else self.rows
        if not given:
            raise UserError("rows is empty: give at least one")
        columns = task.columns
        for number, row in enumerate(given, start=1):
            if isinstance(row, str) and len(columns) != 1:
                raise UserError(
                    f"row {number} of the input is a text, and task {task.name} reads {', '.join(columns)}: give an "
                    "object with these"
                )
        return [{columns[0]: row} if isinstance(row, str) else row for row in given]


def _flat(tree: Any) -> Any:
    """A tree, if it is not deeper than whatever takes it apart can go."""
    level = [tree]
    for _ in range(DEEPEST):
        inside = (
            each.values() if isinstance(each, dict) else each
            for each in level
            if isinstance(each, dict | list)
        )
        if not (level := list(chain.from_iterable(inside))):
            return tree
    raise UserError(f"the request has more than {DEEPEST} objects and lists within each other: write it flat")


class Predicted(BaseModel):
    id: Any
    """Of the row, if it has one; otherwise its number."""
    prediction: str | int | float
    """The label, the number of the chosen candidate, or the number."""
    probabilities: dict[str, float] | None
    """Of every label, or of every candidate by its number; none for a regression."""

    @classmethod
    def of(cls, made: Prediction) -> Predicted:
        shares = None if made.probabilities is None else dict(made.probabilities)
        return cls(id=made.id, prediction=made.value, probabilities=shares)


class Answer(BaseModel):
    predictions: list[Predicted]


class AdapterShown(BaseModel):
    name: str
    task: str
    kind: str
    """classification, choice or regression."""
    columns: list[str]
    """What a row must have."""
    labels: list[str]
    method: str
    cell: str | None
    prompt_tokens: int
    first_layer: int
    """The layer before which the prompt enters."""
    text_tokens: int
    """Most tokens of a row: the end of a longer one is not read."""
    version: str | None
    """SHA-256 of its weights."""

    @classmethod
    def of(cls, name: str, held: Held) -> AdapterShown:
        adapter, task, card = held.loaded.adapter, held.loaded.task, held.loaded.card
        return cls(
            name=name,
            task=task.name,
            kind=task.kind,
            columns=list(task.columns),
            labels=list(task.labels),
            method=adapter.config.method,
            cell=adapter.config.cell if adapter.cell is not None else None,
            prompt_tokens=adapter.prompt_tokens,
            first_layer=adapter.first_layer,
            text_tokens=held.loaded.text_tokens,
            version=card.weights_sha256,
        )


class Adapters(BaseModel):
    encoder: str
    adapters: list[AdapterShown]


class Problem(BaseModel):
    detail: str
    """What is wrong, and what to do."""


class State(BaseModel):
    status: str
