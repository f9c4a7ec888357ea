"""Examples and the decisions on them as JSON, from which they can be scored again without the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpc_dist.tasks.example import Example


def describe(examples: Sequence[Example], decisions: Sequence[Any]) -> list[dict[str, Any]]:
    """Each example's id, target and decision, and what else scoring needs; groups and sources are numbered."""
    groups: dict[Any, int] = {}
    sources: dict[Any, int] = {}
    found = []
    for example, decision in zip(examples, decisions, strict=True):
        one: dict[str, Any] = {"id": example.id, "target": example.target, "decision": decision}
        if example.group is not None:
            one["group"] = groups.setdefault(example.group, len(groups))
        if example.source is not None:
            one["source"] = sources.setdefault(example.source, len(sources))
        if "answers" in example.meta:  # ReCoRD's F1 compares strings
            one["meta"] = {key: example.meta[key] for key in ("candidates", "answers")}
        found.append(one)
    return found


def read_examples(described: Sequence[Mapping[str, Any]]) -> list[Example]:
    """The examples that `describe` described, without their text."""
    return [
        Example(
            id=one["id"],
            rows=(),
            target=tuple(one["target"]) if isinstance(one["target"], list) else one["target"],
            group=one.get("group"),
            source=one.get("source"),
            meta=one.get("meta", {}),
        )
        for one in described
    ]
