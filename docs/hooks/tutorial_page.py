"""A script with `# %%` cells as a page: what stands in `# %% [markdown]` cells is text, the rest is code."""

from __future__ import annotations

import re
from pathlib import Path


def page(script: Path) -> str:
    """The page of a script, as Markdown."""
    parts = re.split(r"^# %%(.*)\n", script.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    lines = []
    for kind, body in zip(parts[::2], parts[1::2], strict=True):
        if kind.strip() == "[markdown]":
            lines.append(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE))
        else:
            lines.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(lines) + "\n"
