"""Typed trees: how the files a user writes (recipes, searches, studies) are read, and what is said about a wrong one.

Unknown and duplicate keys are errors that list the valid ones. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from gpc_dist.errors import UserError


class Section(BaseModel):
    """A mapping of a file: its keys are its fields, each documented under it, and no other is taken."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, frozen=True, validate_default=True
    )


def all_keys(tree: type[Section]) -> dict[str, FieldInfo]:
    """Every dotted key with its field: `train.lr` -> FieldInfo (default, documentation)."""
    found: dict[str, FieldInfo] = {}
    for name, field in tree.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= {f"{name}.{key}": inner for key, inner in all_keys(field.annotation).items()}
        else:
            found[name] = field
    return found


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; a recipe must not."""

    # as they are written: a key beside a merge (`<<: *other`) may have another value than the merged one
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        scalars = (key for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key in scalars:
            if key.value in seen:
                raise UserError(f"duplicate key '{key.value}'{key.start_mark}: keep one of them")
            seen.add(key.value)
        return node


def parse_yaml(text: str, source: str) -> Any:
    """What a YAML text says; raises `UserError` for duplicate keys and anything that is no YAML."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {error}") from None


def yaml_names(folder: Path) -> list[str]:
    """Names of the YAML files in a packaged folder, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_yaml(kind: str, given: str, folder: Path) -> tuple[Path, Any]:
    """The YAML file that a user means, and what it says ({} for an empty one).

    Args:
        kind: what to call it in errors.
        given: a path, or the name of a file in the packaged `folder`.

    Raises:
        UserError: there is none, or it is not valid.
    """
    path = Path(given)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"{kind} file {path} does not exist")
    elif given in yaml_names(folder):
        path = folder / f"{given}.yaml"
    else:
        raise UserError(f"no {kind} '{given}': give a YAML file or one of {', '.join(yaml_names(folder))}")
    return path, parse_yaml(path.read_text(encoding="utf-8"), f"{kind} {given}") or {}


def read_overrides(words: Sequence[str]) -> dict[str, str]:
    """The `--dotted.key VALUE` and `--dotted.key=VALUE` pairs of a command line.

    Raises:
        UserError: something else, a key without a value, or a key given twice.
    """
    found: dict[str, str] = {}
    pending = list(words)
    while pending:
        word = pending.pop(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected argument '{word}': settings are given as --section.key VALUE")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not pending:
                raise UserError(f"--{key} needs a value")
            value = pending.pop(0)
        if key in found:
            raise UserError(f"--{key} is given twice: keep one of them")
        found[key] = value
    return found


def parse_overrides(overrides: dict[str, str], valid: Sequence[str]) -> dict[str, Any]:
    """The values of dotted overrides given as YAML scalar text; raises `UserError` for a key that is not valid."""
    for key in overrides:
        if key not in valid:
            raise UserError(unknown_key(key, valid))
    return {key: parse_value(key, text) for key, text in overrides.items()}


def parse_value(key: str, text: str) -> Any:
    """The value of an override given as YAML scalar text; raises `UserError` for anything that is no YAML."""
    return parse_yaml(text, f"--{key}") if text else text


def unknown_key(key: str, valid: Sequence[str]) -> str:
    """What to say about a key that is none of the valid ones: the nearest, and those of its section."""
    close = difflib.get_close_matches(key, valid, n=1)
    siblings = list(dict.fromkeys(k.split(".")[0] for k in valid))
    for section in (key.split(".")[0], key.rpartition(".")[0]):
        siblings = [k for k in valid if section and k.startswith(f"{section}.")] or siblings
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"unknown key '{key}'{hint} Valid keys: {', '.join(siblings)}"


def explain(error: ValidationError, valid: Sequence[str]) -> str:
    """What is wrong with a tree whose valid keys these are, one line for each problem."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(unknown_key(key, valid))
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = problem.get("input")
            shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
            lines.append(f"{key}: {message}{shown}" if key else message)
    return "\n".join(lines)
