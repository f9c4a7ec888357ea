"""The README and the pages of docs/: their blocks of code, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "studies" not in path.parts),
]
"""All but the reports that studies wrote."""


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    needs: str
    """Why no test runs it ("needs a cluster"); empty for one that a test runs."""
    text: str

    @property
    def lines(self) -> list[list[str]]:
        """The words of each line of shell commands; comments and empty lines are left out."""
        words = [shlex.split(line, comments=True) for line in self.text.splitlines()]
        return [line for line in words if line]


def blocks(page: Path) -> list[Block]:
    found = re.findall(
        r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', page.read_text(), re.DOTALL | re.MULTILINE
    )
    return [Block(page.relative_to(ROOT).as_posix(), *each) for each in found]


BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
