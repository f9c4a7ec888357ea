"""Private parts of MLflow: the form in which its web page keeps a view of runs that somebody shared."""

from __future__ import annotations

import json
from collections.abc import Sequence

from gpc_dist.private import check_version

check_version("mlflow")

LARGEST_VIEW = 5000
"""Characters that the tag of an experiment may have."""


def view_tag(key: str) -> str:
    """The tag of an experiment that holds the view with this key."""
    return f"mlflow.sharedViewState.{key}"


def view_address(experiment_id: str, key: str) -> str:
    """The part of a view's address after the server's."""
    return f"/#/experiments/{experiment_id}/runs?viewStateShareKey={key}"


def view(
    condition: str,
    metrics: Sequence[str],
    params: Sequence[str],
    tags: Sequence[str],
    order_by: str,
    ascending: bool,
    group_by: str | None,
) -> str:
    """A view of an experiment's runs as a table.

    Args:
        condition: which runs, in the language of MLflow's search.
        metrics, params, tags: the table's columns.
        order_by: the metric that sorts them.
        group_by: a tag; runs that have the same value become one row with the mean of their metrics.
    """
    columns = [_column("metrics", name) for name in metrics]
    columns += [_column("params", name) for name in params]
    columns += [_column("tags", name) for name in tags]
    group = {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": group_by}]}
    state = {
        "searchFilter": condition,
        "orderByKey": _column("metrics", order_by),
        "orderByAsc": ascending,
        "selectedColumns": columns,
        "groupBy": group if group_by else None,
    }
    return json.dumps(state, ensure_ascii=False)


def _column(kind: str, name: str) -> str:
    return f"{kind}.`{name}`"
