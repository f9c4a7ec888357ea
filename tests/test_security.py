"""SECURITY.md names a test for each of its lines."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINES = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if line.startswith("| ")]


def test_every_line_has_a_test_that_is_there() -> None:
    held = [line for line in LINES if "::" in line]
    assert len(held) > 15
    for line in held:
        for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line):
            functions = ast.walk(ast.parse((ROOT / file).read_text()))
            assert name in {each.name for each in functions if isinstance(each, ast.FunctionDef)}, line
