"""The reference, written from the program: keys from the typed trees, commands from their parsers."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo

from gpc_dist import cli
from gpc_dist.config import Config
from gpc_dist.schema import Section
from gpc_dist.search.distribution import Distribution
from gpc_dist.search.spec import SearchSpec
from gpc_dist.study.spec import StudySpec


def pages() -> dict[str, str]:
    """The generated pages, by their place in the site, as Markdown."""
    return {
        "reference/keys.md": _keys_of_a_run(),
        "reference/search-keys.md": _keys_of_a_search(),
        "reference/study-keys.md": _keys_of_a_study(),
        "reference/commands.md": _commands(),
    }


def _keys_of_a_run() -> str:
    intro = (
        "Every key of a recipe. In a YAML file a key stands in its section, on the command line it is "
        "`--section.key VALUE`: text and paths as they are, anything else as YAML, `null` for none."
    )
    return _page("Keys of a run", intro, Config)


def _keys_of_a_search() -> str:
    intro = (
        "Every key of the file that [`gpc-dist tune`](commands.md#gpc-dist-tune) takes; on the command line "
        "`--key VALUE`, such as `--trials 8`."
    )
    space = ["## A key of the space", "", Distribution.__doc__ or "", *_fields(Distribution, "")]
    return _page("Keys of a search", intro, SearchSpec) + "\n".join(space) + "\n"


def _keys_of_a_study() -> str:
    intro = (
        "Every key of the file that [`gpc-dist study`](commands.md#gpc-dist-study) takes; on the command line "
        "`--key VALUE`, such as `--tasks.cola.settings.train.steps 200`."
    )
    return _page("Keys of a study", intro, StudySpec)


def _page(title: str, intro: str, tree: type[Section]) -> str:
    return "\n".join([f"# {title}", "", intro, *_fields(tree, "")]) + "\n"


def _fields(tree: type[Section], prefix: str) -> Iterator[str]:
    """The lines for the keys of a tree: first its own, then those of its sections, each under a heading."""
    inner = {name: _section(field) for name, field in tree.model_fields.items()}
    schema = tree.model_json_schema()
    for name, field in tree.model_fields.items():
        if inner[name] is None:
            yield from _field(f"{prefix}{name}", field, schema["properties"][name], schema.get("$defs", {}))
    for name, section in inner.items():
        if section is not None:
            below, placeholder = section
            path = f"{prefix}{name}." + (f"{placeholder}." if placeholder else "")
            shown = path.removesuffix(".").replace("<", "&lt;")
            yield from ["", f"## {shown} {{ #{prefix}{name} }}"]
            if documented := tree.model_fields[name].description:
                yield from ["", _linked(documented)]
            yield from _fields(below, path)


def _section(field: FieldInfo) -> tuple[type[Section], str] | None:
    """The section that a field is, and what stands for a name in it where it holds one for each name."""
    kind: Any = field.annotation
    if isinstance(kind, type) and issubclass(kind, Section):
        return kind, ""
    held = get_args(kind)[1:]
    if held and isinstance(held[0], type) and issubclass(held[0], Section) and held[0] is not Distribution:
        return held[0], "<name>"
    return None


def _field(key: str, field: FieldInfo, schema: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    taken = _takes(schema, definitions)
    if field.is_required():
        default = "required"
    elif field.default is None:
        default = "not given by default"
    else:
        default = f"default `{_value(schema['default'])}`" if "default" in schema else ""
    anchor = f"{{ #{key} }}" if "<" not in key else ""
    said = "; ".join(filter(None, (taken, default)))
    return ["", f"### `{key}` {anchor}", "", f"*{said}*", "", _linked(field.description or "")]


def _takes(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What a value may be, in words, from its JSON schema."""
    if "$ref" in schema:
        return _takes(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        kinds = [_takes(each, definitions) for each in schema["anyOf"] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if values := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        return ", ".join(f"`{value}`" for value in values)
    kind = schema.get("type")
    if kind == "array":
        return f"list of {_takes(schema['items'], definitions)}" if schema.get("items") else "list"
    if kind == "object":
        return "mapping"
    words = {
        "integer": "whole number",
        "number": "number",
        "boolean": "`true` or `false`",
        "string": schema.get("format", "text"),
        None: "any value",
    }[kind]
    return words + "".join(
        f" {said} {_short(schema[name])}" for name, said in _BOUNDS.items() if name in schema
    )


_BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}


def _value(default: Any) -> str:
    return default if isinstance(default, str) and default else json.dumps(default)


def _short(number: float) -> str:
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:g}"


def _commands() -> str:
    (subparsers,) = (a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    lines = [
        "# Commands",
        "",
        "`gpc-dist COMMAND --help` shows the same, and with a recipe's command [every key](keys.md). "
        "Exit codes: 0 done, 2 usage or input, 3 the machine, 75 stopped with the state saved.",
    ]
    for name, parser in subparsers.choices.items():
        lines += _command(name, cli.COMMANDS[name], parser)
    return "\n".join(lines) + "\n"


def _command(name: str, command: Any, parser: argparse.ArgumentParser) -> list[str]:
    usage = re.sub(r"\s+", " ", parser.format_usage().removeprefix("usage: ")).strip()
    lines = ["", f"## gpc-dist {name}", "", command.summary, "", "```text", usage, "```", ""]
    for part in command.detail.split("\n\n"):
        if found := re.match(r"examples?: +", part):
            shown = part.replace(found[0], " " * len(found[0]), 1)
            lines += ["```bash", *(line.strip() for line in shown.splitlines()), "```", ""]
        else:
            lines += [_linked(part), ""]
    lines += ["| argument | |", "|---|---|"]
    for action in parser._actions:
        if action.dest in ("help", "verbose", "quiet"):
            continue
        value = str(action.metavar or " or ".join(action.choices or [action.dest.upper()])).replace(
            "|", " or "
        )
        names = ", ".join(action.option_strings)
        shown = value if not names else names if action.nargs == 0 else f"{names} {value}"
        lines.append(f"| `{shown}` | {_linked(action.help or '')} |")
    if command.settings == "recipe":
        lines += ["| `--section.key VALUE` | [the keys of a run](keys.md) |"]
    lines += ["| `-v`, `-q` | log details; log warnings and errors only |"]
    return lines


def _linked(text: str) -> str:
    """A docstring as Markdown: its mentions of pages are links, what stands in angle brackets is no element."""
    parts = text.split("`")  # every second one is code
    plain = [
        re.sub(r"docs/([\w-]+)\.md", r"[\1](../\1.md)", part.replace("<", "&lt;")) for part in parts[::2]
    ]
    parts[::2] = plain
    return "`".join(parts)
