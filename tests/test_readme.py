"""The commands of the README and of the pages exist, and the README's Python runs as it stands.

`test_page_commands.py` runs them.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpc_dist import cli, config, schema
from gpc_dist.encoder.frozen import encoder_path
from gpc_dist.search import spec
from gpc_dist.study import spec as study
from tests.pages import BLOCKS, PAGES, ROOT, SHELL

README = (ROOT / "README.md").read_text()
COMMANDS = list(
    {" ".join(words): words for block in SHELL for words in block.lines if words[0] == "gpc-dist"}.values()
)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_is_understood(words: list[str]) -> None:
    options, rest = cli.build_parser().parse_known_args(words[1:])
    overrides = schema.read_overrides(rest)
    if words[1] == "tune":
        if not options.resume:  # of a search that was begun before
            spec.load(options.search, overrides)
    elif words[1] == "study":
        study.load(options.study, overrides)
    elif words[1:3] == ["submit", "tune"]:
        spec.load(options.recipe, overrides)
    elif (
        not hasattr(options, "recipe") or options.recipe.endswith(".yaml") or "engine.ds_config" in overrides
    ):
        config.build({}, {key: value for key, value in overrides.items() if key != "engine.ds_config"})
    else:
        config.load(options.recipe, overrides)


def test_every_command_is_shown() -> None:
    assert {words[1] for words in COMMANDS} >= cli.COMMANDS.keys()


def test_the_readme_tells_its_four_stories() -> None:
    shown = {words[1] for block in SHELL if block.page == "README.md" for words in block.lines if words[1:]}
    assert {"train", "evaluate", "predict", "submit", "jobs", "tune", "compare", "study"} <= shown


def test_a_block_that_no_test_runs_says_why() -> None:
    for block in SHELL:
        assert block.needs.startswith(("needs ", "takes ")) or not block.needs
        if not block.needs:
            assert {words[0] for words in block.lines} <= {"gpc-dist", "make"}, block


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    text = "".join(page.read_text() for page in PAGES)
    targets = set(re.findall(r"(?:^|`)make (\w[\w-]*)", text, re.MULTILINE))
    assert {"setup", "demo", "test", "check", "docs"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_notebook_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    (code,) = [block.text for block in BLOCKS if block.page == "README.md" and block.language == "python"]
    scope = {"path": encoder_path(config.EncoderConfig())}
    exec(code, scope)
    assert torch.equal(scope["again"](**scope["batch"]), scope["model"](**scope["batch"]))  # type: ignore[operator]


def test_the_readme_leads_to_every_page() -> None:
    links = {tuple(link.split("#")) for link in re.findall(r"\]\((?!http)([^)]+)\)", README)}
    pages = {str(page.relative_to(ROOT)) for page in PAGES} - {"README.md"}
    assert pages <= {file for file, *_ in links}
    for file, *anchors in links:
        titles = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(errors="ignore"), re.MULTILINE)
        headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert set(anchors) <= headings
