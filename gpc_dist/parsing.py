"""YAML and JSON as they may come from anybody: no key twice, text that is text, nothing that outgrows its file.

An alias of YAML stands for what it names, so that a few hundred bytes can stand for more than a machine holds; brackets
in brackets end a recursive reader. Both are counted before a value is made.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import yaml

from gpc_dist.errors import UserError

# the C library's, where PyYAML has it: a study reads a recipe for each of its trials
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

DEEPEST = 64
"""Mappings and lists within each other."""
LARGEST = 1_000_000
"""Keys and values of a YAML text, with each alias counted as what it stands for."""

QUOTE = "put quotes around text that YAML reads otherwise"
_HALF = re.compile(r"\\[uU][0-9a-fA-F]*[dD][89a-fA-F][0-9a-fA-F]{2}")
"""May be one half of a character of two code units, which no file can hold by itself."""


def parse_yaml(text: str, source: str) -> Any:
    """What a YAML text says; None for an empty one.

    Args:
        source: what to call it in errors.

    Raises:
        UserError: it is no YAML, has a key twice, or stands for too much.
    """
    try:
        _check_depth(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_node(node, {})
            return _whole_characters(text, loader.construct_document(node))
        finally:
            loader.dispose()
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{source} is not valid YAML: {place}{error.problem}; {QUOTE}") from None
    except Exception as error:  # such as ValueError, for a date with a month 13
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{source} is not valid YAML: {reason}; {QUOTE}") from None


def to_yaml(tree: Any) -> str:
    """A tree of mappings, lists and plain values as YAML; `parse_yaml` reads the same tree."""
    text: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    # PyYAML writes this line break as it is, and reads a blank
    return yaml.safe_dump(tree, sort_keys=False) if "\x85" in text else text


def parse_json(text: str | bytes, source: str) -> Any:
    """What a JSON text says.

    Args:
        text: bytes are UTF-8.
        source: what to call it in errors.

    Raises:
        UserError: it is no JSON, or has a key twice in one object.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        return _whole_characters(text, json.loads(text, object_pairs_hook=_without_repeated))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except RecursionError:
        raise UserError(f"{source} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{source} is not valid JSON: {error}") from None


def _check_depth(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise UserError(f"more than {DEEPEST} mappings and lists stand within each other")


def _check_node(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return how many nodes it stands for, and how many within each other.

    Args:
        known: by id, of the nodes that were counted; None while one is being counted.
    """
    place = f"line {node.start_mark.line + 1}"
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise UserError(f"{place}: an alias stands within what it names")
        return found
    known[id(node)] = None
    size, depth = 1, 0
    for child in _children(node):
        below, deep = _check_node(child, known)
        size, depth = size + below, max(depth, deep)
        if size > LARGEST:
            raise UserError(f"{place}: its aliases stand for more than {LARGEST:,} values")
    depth += isinstance(node, yaml.CollectionNode)
    if depth > DEEPEST:
        raise UserError(f"{place}: more than {DEEPEST} mappings and lists stand within each other")
    known[id(node)] = size, depth
    return size, depth


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        # as they are written: a key beside a merge (`<<: *other`) may have another value than the merged one
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise UserError(f"duplicate key {key.value!r} in line {line}: keep one of them")
                seen.add(key.value)
            yield from (key, value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _without_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise UserError(f"duplicate key {twice!r}: keep one of them")
    return found


def _whole_characters(text: str, value: Any) -> Any:
    """The value, if all its text can be written as UTF-8."""
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise UserError(
                "it holds one half of a character of two code units (\\ud800 to \\udfff): write the character itself"
            ) from None
    return value
