"""Typed trees: how the files a user writes (recipes, searches, studies) are read, and what is said about a wrong one.

Unknown and duplicate keys are errors that list the valid ones. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
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


def parse_overrides(overrides: dict[str, str], valid: Sequence[str]) -> dict[str, Any]:
    """The values of dotted overrides given as YAML scalar text; raises `UserError` for a key that is not valid."""
    for key in overrides:
        if key not in valid:
            raise UserError(unknown_key(key, valid))
    return {key: parse_yaml(text, f"--{key}") if text else text for key, text in overrides.items()}


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
