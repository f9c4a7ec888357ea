"""What MkDocs is given beside the files of this folder: the README as the home page, files of the repository that
pages link to, and the pages that are written from the program and from the tutorial."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

import reference
import tutorial_page
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
TAKEN = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "gpc_dist/recipes/demo_data/README.md": "demo-data.md",
}
"""Pages that stand outside docs/, and their places in the site."""
MOVED = TAKEN | {"docs/tutorial.py": "tutorial.md"}
"""Files of the repository that have another place in the site than in docs/."""


def on_files(files: Files, config: Any) -> Files:
    for source, place in TAKEN.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    for picture in sorted((ROOT / "benchmarks").glob("*.png")):
        place = f"benchmarks/{picture.name}"
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    written = reference.pages() | {
        "tutorial.md": tutorial_page.page(ROOT / "docs" / "tutorial.py"),
        "results/studies.md": _studies(),
    }
    for place, text in written.items():
        files.append(File.generated(config, place, content=text))
    return files


def _studies() -> str:
    names = sorted(report.parent.name for report in (ROOT / "docs" / "studies").glob("*/report.md"))
    links = "\n".join(f"* [{name}](../studies/{name}/report.md)" for name in names)
    intro = "As `gpc-dist study` wrote them; [how to read one](../study.md#how-to-read-one)."
    return f"# Reports of studies\n\n{intro}\n\n{links}\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they hold in the repository, made to hold in the site."""
    here = page.file.src_uri
    source = {place: name for name, place in MOVED.items()}.get(here, f"docs/{here}")

    def moved(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        aimed = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = MOVED.get(aimed, aimed.removeprefix("docs/"))
        return f"]({os.path.relpath(place, posixpath.dirname(here) or '.')}{anchor})"

    return re.sub(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)", moved, markdown)
