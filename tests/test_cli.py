"""The command line as a newcomer meets it."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpc_dist import cli, config, schema
from gpc_dist.errors import EXIT_ENVIRONMENT, EXIT_USAGE
from tests.conftest import gpc
from tests.processes import cold_command

HEAVY = {"torch", "deepspeed", "transformers", "datasets", "mlflow", "ray"}
HEAVY |= {"matplotlib", "numpy", "pandas", "scipy", "sklearn"}


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["predict", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"import sys; sys.argv[1:] = {arguments}; from gpc_dist.cli import entry\ntry: entry()\n"
    code += "finally: print(sorted(m for m in sys.modules if '.' not in m), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: gpc-dist" in done.stdout
    assert set(ast.literal_eval(done.stderr.splitlines()[-1])) & HEAVY == set()


def test_help_names_every_command_and_every_key() -> None:
    shown = cold_command("--help").stdout
    for name in cli.COMMANDS:
        assert re.search(rf"^    {name}\s", shown, re.MULTILINE)
    keys = cold_command("train", "--help").stdout
    for key in schema.all_keys(config.Config):
        assert f"--{key} " in keys


def test_init_copies_files_that_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", str(tmp_path / "work")]) == 0
    recipes = sorted((tmp_path / "work" / "recipes").glob("*.yaml"))
    assert [recipe.stem for recipe in recipes] == config.recipe_names()
    for recipe in recipes:
        assert config.load(str(recipe)) == config.load(recipe.stem)
    copied = (
        "ds_configs/zero3.json",
        "slurm/train.sbatch",
        "slurm/job.sh",
        "tune/demo.yaml",
        "tune/studies/minilm.yaml",
    )
    for file in copied:
        assert (tmp_path / "work" / file).is_file()
    assert cli.main(["init", str(tmp_path / "work")]) == EXIT_USAGE
    assert "already has" in capsys.readouterr().err


def test_doctor_reports_and_succeeds_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "deepspeed" in said
    assert "ready to train" in said


@pytest.mark.parametrize(
    "words",
    [
        ["--adapter.prompt_text", "-v", "--train.steps=3", "rte"],
        ["rte", "--adapter.prompt_text", "-v", "--train.steps", "3"],
        ["--adapter.prompt_text=-v", "rte", "--train.steps=3"],
    ],
)
def test_a_setting_may_stand_anywhere_and_say_anything(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run(options: Any, settings: dict[str, str], given: list[str]) -> int:
        seen.append((options.recipe, options.verbose, settings, given))
        return 0

    monkeypatch.setitem(cli.COMMANDS, "train", replace(cli.COMMANDS["train"], run=run))
    assert cli.main(["train", *words]) == 0
    assert seen == [("rte", 0, {"adapter.prompt_text": "-v", "train.steps": "3"}, ["train", *words])]


def test_settings_are_refused_where_there_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", "here", "--train.lr", "1"]) == EXIT_USAGE
    assert "unexpected argument '--train.lr'" in capsys.readouterr().err
    assert cli.main(["train", "rte", "--train.lr"]) == EXIT_USAGE
    assert "--train.lr needs a value" in capsys.readouterr().err


def test_words_that_are_not_utf_8_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "rte", "--run.name", "caf\udce9"]) == EXIT_USAGE
    assert "'caf\\udce9' is not UTF-8 text" in capsys.readouterr().err


def test_what_the_system_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["init", str(tmp_path / "file")]) == EXIT_ENVIRONMENT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"gpc-dist: error: {tmp_path}/file/ds_configs: ")


RESULT = {
    "task": "rte",
    "method": "gpc",
    "main_metric": "accuracy",
    "metrics": {"best": {"accuracy": 0.75}},
    "majority_baseline": {"accuracy": 0.5},
    "trainable_parameters": 10,
    "frozen_parameters": 20,
    "wall_s": 3.0,
}


def test_results_leave_out_what_is_no_finished_run_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a shell's `runs/*` gives it."""
    contents = {
        "better": RESULT | {"metrics": {"best": {"accuracy": 0.875}}},
        "good": RESULT,
        "diverged": RESULT | {"metrics": {"best": {}}},
        "other-metric": RESULT | {"main_metric": "f1", "metrics": {"best": {"f1": 0.25}}},
        "search": {"metric": "accuracy", "best_trial": "003"},
        "list": [],
        "going-on": None,
    }
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "result.json").write_text(json.dumps(content))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "result.json").write_bytes(b'{"task": "\xe9')
    (tmp_path / "mlflow.db").touch()
    assert cli.main(["results", *map(str, sorted(tmp_path.iterdir()))]) == 0
    shown, said = capsys.readouterr()
    rows = [line.split() for line in shown.splitlines()[2:]]
    assert [row[1] for row in rows] == [
        "(majority)",
        "diverged",
        "good",
        "better",
        "(majority)",
        "other-metric",
    ]
    assert rows[3][4] == "0.8750"
    left_out = [line.partition("left out: ")[2] for line in said.splitlines()]
    assert len(left_out) == 5
    for reason in (
        f"{tmp_path}/going-on holds no finished run: result.json is missing",
        f"{tmp_path}/search/result.json is not the result of a run",
        f"{tmp_path}/mlflow.db is not a folder",
    ):
        assert reason in left_out


def test_results_of_no_run_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["results", str(tmp_path), str(tmp_path / "nothing")]) == EXIT_USAGE
    said = capsys.readouterr().err
    assert "result.json is missing" in said
    assert "nothing is not a folder" in said


def test_no_command_is_a_usage_error() -> None:
    done = cold_command()
    assert done.returncode == EXIT_USAGE
    assert "COMMAND" in done.stderr


@pytest.mark.parametrize(
    "words", [["no-such-recipe"], ["demo", "--train.lrr", "1"], ["demo", "-q", "-v"], []]
)
def test_a_batch_script_is_told_what_would_fail_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setenv("GPC_DIST_REFUSAL", str(tmp_path / "note"))
    try:
        code = gpc("train", *words)
    except SystemExit as ended:  # as argparse does it
        code = ended.code
    assert code == EXIT_USAGE
    assert (tmp_path / "note").read_text()


def test_a_note_that_cannot_be_written_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPC_DIST_REFUSAL", str(tmp_path / "missing" / "note"))
    assert gpc("train", "no-such-recipe") == EXIT_USAGE
    assert capsys.readouterr().err.startswith("gpc-dist: error: no recipe 'no-such-recipe'")


def test_help_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPC_DIST_REFUSAL", str(tmp_path / "note"))
    with pytest.raises(SystemExit):
        gpc("train", "--help")
    assert not (tmp_path / "note").exists()
