"""What may be the name of a folder, and paths that lead out of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpc_dist import config
from gpc_dist.errors import UserError
from gpc_dist.names import check_name, fault_of, inside
from gpc_dist.search import spec as search
from gpc_dist.study import spec as study


@pytest.mark.parametrize(
    "name",
    ["rte", "001", "null", "café", "my run", "rte-{task}", "a.b", "x" * 200, "日本", "customer's", "a,b=c"],
)
def test_names(name: str) -> None:
    assert fault_of(name) == ""
    assert check_name(name, "the trial") == name


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("", "is empty"),
        (".", "begins with ."),
        ("..", "begins with ."),
        (".hidden", "begins with ."),
        ("-rf", "begins with -"),
        ("--me", "begins with -"),
        ("a/b", "is a path"),
        ("../x", "begins with ."),
        ("/tmp/x", "is a path"),
        ("a\\b", "is a path"),
        ("a\nb", "holds control characters"),
        ("a\0b", "holds control characters"),
        ("a\x1b[31m", "holds control characters"),
        ("a\u202eb", "holds control characters"),
        ("a\ud800", "holds control characters"),
        ("é" * 101, "is longer than 200 bytes"),
        (None, "is empty, or no text"),
        (["a"], "is empty, or no text"),
    ],
)
def test_what_is_no_name(name: object, fault: str) -> None:
    assert fault_of(name).startswith(fault)
    with pytest.raises(UserError, match="^the trial '"):
        check_name(name, "the trial")


def test_paths_stay_inside(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "secret").write_text("")
    (folder / "mine").write_text("")
    (folder / "near").symlink_to("mine")
    (folder / "far").symlink_to("../secret")
    (folder / "round").symlink_to("round")
    (tmp_path / "same").symlink_to("run")
    assert inside(folder, "mine") == folder / "mine"
    assert inside(folder, "near") == folder / "near"
    assert inside(folder, "not/there") == folder / "not/there"
    assert inside(tmp_path / "same", "mine") == tmp_path / "same/mine"
    for path in ("far", "round", "../secret", str(tmp_path / "secret"), "a\0b"):
        with pytest.raises(UserError, match="leads out of"):
            inside(folder, path)


@pytest.mark.parametrize("name", ["..", "../x", "/tmp/x", "-rf", "a\x1b[31m", "x" * 201])
def test_recipes_searches_and_studies_name_folders(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="^run.name: the name "):
        config.build({"run": {"name": name}})
    for load, text in (
        (search.load, "recipe: rte\nspace: {train.lr: [1, 2]}\ntrials: 1"),
        (study.load, STUDY),
    ):
        file = tmp_path / "file.yaml"
        file.write_text(text)
        with pytest.raises(UserError, match="^name: the name "):
            load(str(file), {"name": name})  # type: ignore[operator]


STUDY = "tasks: {cb: {}}\nmethods: {gpc: {}}"


@pytest.mark.parametrize("section", ["tasks", "methods"])
def test_tasks_and_methods_of_a_study_become_folders(tmp_path: Path, section: str) -> None:
    file = tmp_path / "study.yaml"
    for name in ("..", "-x", "a/b", "a.b", "x" * 81):
        named = {"tasks": "cb", "methods": "gpc", section: name}
        file.write_text(
            f"tasks: {{'{named['tasks']}': {{recipe: cb}}}}\n"
            f"methods: {{'{named['methods']}': {{settings: {{adapter.method: gpc}}}}}}"
        )
        with pytest.raises(
            UserError, match=r"becomes the name of a folder: use letters, digits, - \(not in front\)"
        ):
            study.load(str(file))


def test_trials_can_be_called_after_a_search_with_the_longest_name(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(STUDY)
    named = study.load(str(file), {"name": "x" * 80})
    longest = f"{named.name}-{'y' * 80}-search-packed"
    file.write_text("recipe: rte\nspace: {train.lr: [1, 2]}\ntrials: 1")
    assert search.load(str(file), {"name": longest}).name == longest
    assert config.build({"run": {"name": f"{longest}-99999"}}).run.name == f"{longest}-99999"
