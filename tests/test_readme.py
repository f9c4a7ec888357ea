"""The README's commands exist and its Python runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from gpc_dist import cli, config, schema
from gpc_dist.encoder.frozen import encoder_path
from gpc_dist.search import spec
from gpc_dist.study import spec as study

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.startswith("gpc-dist ")
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_the_readme_is_understood(words: list[str]) -> None:
    options, rest = cli.build_parser().parse_known_args(words[1:])
    overrides = schema.read_overrides(rest)
    if words[1] == "tune":
        if not options.resume:  # of a search that was begun before
            spec.load(options.search, overrides)
    elif words[1] == "study":
        study.load(options.study, overrides)
    elif words[1:3] == ["submit", "tune"]:
        spec.load(options.recipe, overrides)
    elif not hasattr(options, "recipe") or options.recipe == "my-recipe.yaml":
        config.build({}, overrides)
    else:
        config.load(options.recipe, overrides)


def test_the_readme_shows_the_commands() -> None:
    shown = {words[1] for words in COMMANDS}
    assert {"doctor", "train", "evaluate", "predict", "results", "plan", "bench", "submit", "jobs"} <= shown
    assert {"tune", "compare", "study", "inspect"} <= shown


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    assert {"setup", "demo", "test", "check"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_notebook_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    (code,) = [block for language, block in BLOCKS if language == "python"]
    scope = {"path": encoder_path(config.EncoderConfig())}
    exec(code, scope)
    assert torch.equal(scope["again"](**scope["batch"]), scope["model"](**scope["batch"]))  # type: ignore[operator]


def test_linked_pages_exist() -> None:
    links = {tuple(link.split("#")) for link in re.findall(r"\]\((?!http)([^)]+)\)", README)}
    assert {(f"docs/{page.name}",) for page in (ROOT / "docs").glob("*.md")} <= links
    for file, *anchors in links:
        text = (ROOT / file).read_text()
        headings = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
        assert set(anchors) <= headings
