"""Translates the content of a run's files to MLflow's terms, within the limits of its API."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpc_dist.runs import metrics
from gpc_dist.runs.folder import RunFolder
from gpc_dist.shown import redact

_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_NAME_LENGTH = 250
_WORD_LENGTH = 100
_DIGEST_LENGTH = 36

_NOT_SET: tuple[Any, ...] = (None, [], "")
_OWN = (("run", "name"), ("run", "dir"))
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]", re.ASCII)
_NOT_IN_WORDS = re.compile(r"[^\w\- ]", re.ASCII)

Point = tuple[str, float, int, int]
"""Metric, value, unix time in ms, step."""


def points(line: Mapping[str, Any], step: int, prefix: str = "") -> Iterator[Point]:
    """Yield the measurements in a line of a `MetricLog`, with `prefix` before their names."""
    time_ms = ms(line.get(metrics.TIME, 0.0))
    for key, value in line.items():
        if key in (metrics.STEP, metrics.TIME):
            continue
        if value is None:  # the log writes this for a non-finite value
            yield prefix + key, math.nan, time_ms, step
        elif isinstance(value, int | float):
            yield prefix + key, float(value), time_ms, step


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers in a JSON value under names such as `best/accuracy`; of a list of numbers the largest."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, f"{path}/{key}" if path else key)
    elif isinstance(value, list) and value and all(_is_number(item) for item in value):
        yield path, float(max(value))
    elif _is_number(value):
        yield path, float(value)


def in_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by a word of the user's, a label for example, under words that can be parts of names and stay distinct."""
    words = [_NOT_IN_WORDS.sub("_", word)[:_WORD_LENGTH] for word in values]
    return {
        word if words.count(word) == 1 else f"{word}-{number}": value
        for number, (word, value) in enumerate(zip(words, values.values(), strict=True))
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def params(config: Mapping[str, Any]) -> dict[str, str]:
    """The configuration under its dotted keys, without keys that are not set and the section `tracking`.

    A run's name and folder are left out too: they differ in all runs, so MLflow's comparison would show them as
    the first settings.
    """
    return {
        f"{section}.{key}": redact(text(value))[:_PARAM_LENGTH]
        for section, keys in config.items()
        if section != "tracking" and isinstance(keys, dict)
        for key, value in keys.items()
        if value not in _NOT_SET and (section, key) not in _OWN
    }


def search_params(search: Mapping[str, Any]) -> dict[str, str]:
    """A search under its dotted keys (`space.train.lr`), without its name, the section `tracking` and keys that
    are not set."""
    plain = {
        name(key): redact(text(value))[:_PARAM_LENGTH]
        for key, value in search.items()
        if key not in ("name", "register_as") and not isinstance(value, dict) and value not in _NOT_SET
    }
    return plain | {name(key): value for key, value in params(search).items()}


def tags(values: Mapping[str, Any]) -> dict[str, str]:
    """The values that are not None as the text of tags, without credentials."""
    return {
        name(key): redact(text(value))[:_TAG_LENGTH] for key, value in values.items() if value is not None
    }


def config_tags(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that tags repeat, to filter and group runs: task, method, encoder and group."""
    return {
        "task": config.get("task", {}).get("name"),
        "method": config.get("adapter", {}).get("method"),
        "encoder": config.get("encoder", {}).get("path"),
        "group": config.get("tracking", {}).get("group"),
    }


def fact_tags(facts: Mapping[str, Any], folder: RunFolder) -> dict[str, Any]:
    """Tags of the facts: every number and text, `version.<package>`, and what MLflow's UI shows beside a run."""
    plain = {key: value for key, value in facts.items() if isinstance(value, str | int | float)}
    versions = {f"version.{key}": value for key, value in facts.get("versions", {}).items()}
    shown = {
        "mlflow.note.content": note(facts, folder),
        "mlflow.user": facts.get("user"),
        "mlflow.source.name": facts.get("command"),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": facts.get("git_commit"),
    }
    return plain | versions | shown


def dataset(described: Mapping[str, Any]) -> dict[str, str]:
    """Arguments of MLflow's `Dataset`.

    Args:
        described: `name`, `source` (folder or Hub id), `digest`, and numbers of examples as
            `<split>_examples`.
    """
    examples = {key: value for key, value in described.items() if key.endswith("_examples")}
    return {
        "name": described["name"],
        "digest": described["digest"][:_DIGEST_LENGTH],
        "source_type": "local",
        "source": json.dumps({"uri": redact(described["source"])}),
        "profile": json.dumps(examples),
    }


def note(facts: Mapping[str, Any], folder: RunFolder) -> str:
    """The description of a run or search, in Markdown."""
    note = f"Folder: `{facts.get('host', 'unknown host')}:{folder}`\n"
    if command := facts.get("command"):
        note += f"\nTo reproduce, in `{facts.get('folder', '.')}`:\n\n    {command}\n"
    if commit := facts.get("git_commit"):
        note += f"\nCommit {commit}{' with local changes' if facts.get('git_dirty') else ''}.\n"
    return note


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of the rows, with a column for each key of any row."""
    from tabulate import tabulate

    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[text(row[c]).replace("|", "\\|") if c in row else "" for c in columns] for row in rows]
    return tabulate(cells, headers=columns, tablefmt="github", disable_numparse=True)


def text(value: Any) -> str:
    """The text of a value in a param or a tag: a string unchanged, any other value as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def name(key: str) -> str:
    """`key` as a name in MLflow: characters that it refuses are replaced by `_`, and the length is limited."""
    return _NOT_IN_NAMES.sub("_", key)[:_NAME_LENGTH]


def ms(time_s: float) -> int:
    """Convert seconds to whole milliseconds, the unit of MLflow's times."""
    return int(time_s * 1000)
