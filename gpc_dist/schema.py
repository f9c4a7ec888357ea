"""Typed trees: how the files a user writes (recipes, searches, studies) are read, and what is said about a wrong one.

Unknown and duplicate keys are errors that list the valid ones. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from gpc_dist import files
from gpc_dist.errors import UserError
from gpc_dist.parsing import QUOTE, parse_yaml
from gpc_dist.shown import redact


class Section(BaseModel):
    """A mapping of a file: its keys are its fields, each documented under it, and no other is taken."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
    )


@functools.cache  # a study asks for each of its trials
def all_keys(tree: type[Section]) -> Mapping[str, FieldInfo]:
    """Every dotted key with its field: `train.lr` -> FieldInfo (default, documentation)."""
    found: dict[str, FieldInfo] = {}
    for name, field in tree.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= {f"{name}.{key}": inner for key, inner in all_keys(field.annotation).items()}
        else:
            found[name] = field
    return found


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
    tree = parse_yaml(files.read_text(path), f"{kind} {given}")
    return path, {} if tree is None else tree


def mapping(name: str, given: Any, of: str = "keys to values") -> dict[Any, Any]:
    """A section of a file as a user left it: empty where nothing stands under its name.

    Args:
        of: what it holds, for the message.

    Raises:
        UserError: it is something else than a mapping.
    """
    if not isinstance(given, dict | None):
        raise UserError(f"{name} is a mapping of {of} (given: {given!r})")
    return given or {}


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


def parse_overrides(overrides: Mapping[str, str], fields: Mapping[str, FieldInfo]) -> dict[str, Any]:
    """The values of dotted overrides, see `parse_value`.

    Args:
        fields: every valid key with its field.

    Raises:
        UserError: a key that is not valid, or a value that is no YAML.
    """
    for key in overrides:
        if key not in fields:
            raise UserError(unknown_key(key, fields))
    return {key: parse_value(key, text, fields[key]) for key, text in overrides.items()}


def parse_value(key: str, text: str, field: FieldInfo | None) -> Any:
    """The value of an override as the command line has it.

    A text or a path is taken as it is written, whatever YAML would make of it; `null` is None where the key may be
    left out. Any other value is YAML.

    Args:
        field: the key's; None for one that the caller does not know, whose value is YAML.

    Raises:
        UserError: no YAML.
    """
    kinds = _kinds(field.annotation) if field else [Any]
    if text == "null" and _NONE in kinds:
        return None
    if all(kind in (str, Path, _NONE) for kind in kinds):
        return text
    return parse_yaml(text, f"--{key}") if text else text


_NONE = type(None)


def _kinds(annotation: Any) -> list[Any]:
    """The types that an annotation admits."""
    if get_origin(annotation) in (Union, UnionType):
        return [kind for one in get_args(annotation) for kind in _kinds(one)]
    return [type(one) for one in get_args(annotation)] if get_origin(annotation) is Literal else [annotation]


def unknown_key(key: str, valid: Collection[str]) -> str:
    """What to say about a key that is none of the valid ones: the nearest, and those of its section."""
    close = difflib.get_close_matches(key, valid, n=1)
    siblings = list(dict.fromkeys(k.split(".")[0] for k in valid))
    for section in (key.split(".")[0], key.rpartition(".")[0]):
        siblings = [k for k in valid if section and k.startswith(f"{section}.")] or siblings
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"unknown key '{key}'{hint} Valid keys: {', '.join(siblings)}"


def explain(error: ValidationError, valid: Collection[str]) -> str:
    """What is wrong with a tree whose valid keys these are, one line for each problem."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(unknown_key(key, valid))
        else:
            message = problem["msg"].removeprefix("Value error, ") + _HINTS.get(problem["type"], "")
            given = problem.get("input")
            shown = f" (given: {redact(repr(given))})" if isinstance(given, str | int | float | bool) else ""
            lines.append(f"{key}: {message}{shown}" if key else message)
    return "\n".join(lines)


_HINTS = {
    "string_type": f": {QUOTE}",
    "path_type": f": {QUOTE}",
    "list_type": """, such as '["first", "second"]'""",
}
"""What to add to a message of pydantic."""
