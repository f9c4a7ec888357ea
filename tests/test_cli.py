"""The command line as a newcomer meets it."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpc_dist import cli, config, schema
from gpc_dist.errors import EXIT_ENVIRONMENT, EXIT_USAGE
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
        assert f"\n    {name} " in shown
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


def test_results_of_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["results", str(tmp_path)]) == EXIT_USAGE
    assert "result.json is missing" in capsys.readouterr().err


def test_no_command_is_a_usage_error() -> None:
    done = cold_command()
    assert done.returncode == EXIT_USAGE
    assert "COMMAND" in done.stderr
