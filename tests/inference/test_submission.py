"""SuperGLUE's diagnostics by an adapter of RTE, and a whole submission, from runs on a few rows of each task."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpc_dist.errors import EXIT_DONE, EXIT_USAGE
from gpc_dist.tasks import file_name
from gpc_dist.tasks.archive import LINES, TRAINED
from tests.conftest import SHARED_DATA, gpc
from tests.tasks.test_diagnostics import FILES
from tests.tasks.test_submission import check_submitted
from tests.tasks.test_superglue import FILE_ROWS

pytestmark = pytest.mark.slow

SOURCES = {"train": "train.jsonl", "val": "val.jsonl", "test": "test.jsonl"}
FEW = {"train": "train_32.jsonl", "val": "val_32.jsonl", "test": "val_32.jsonl"}


def rows_of(task: str, split: str) -> list[dict[str, Any]]:
    """The first rows of an official file, where a machine has it; else those that were written for the tests."""
    names = FEW if task == "record" else SOURCES
    file = SHARED_DATA / "superglue" / Path(file_name(task)).stem / names[split]
    if not file.is_file():
        return FILE_ROWS[task]
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(3), strict=False)]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def benchmark_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the benchmark's archive is unpacked."""
    place = tmp_path_factory.mktemp("SuperGLUE")
    for task in TRAINED:
        for split in SOURCES:
            write_rows(place / Path(file_name(task)).stem / f"{split}.jsonl", rows_of(task, split))
    for name, rows in FILES.values():
        write_rows(place / Path(name).stem / name, rows)
    return place


@pytest.fixture(scope="module")
def runs(
    tiny_encoder: Path, benchmark_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    place, made = tmp_path_factory.mktemp("runs"), {}
    for task in TRAINED:
        made[task] = place / task
        data = benchmark_folder / Path(file_name(task)).stem
        words = ["--encoder.path", tiny_encoder, "--data.path", data, "--data.max_length", 32]
        words += ["--adapter.prompt_tokens", 2, "--train.steps", 1, "--train.batch_size", 2]
        words += ["--engine.device", "cpu", "--tracking.enabled", "false", "--run.dir", made[task]]
        assert gpc("train", task, *words) == EXIT_DONE
    return made


def with_figure(run: Path, copy: Path, value: float, data: Mapping[str, Any] | None = None) -> Path:
    """A copy of a run whose best evaluation has another figure, or was on other data."""
    shutil.copytree(run, copy)
    result = json.loads((run / "result.json").read_text())
    result["metrics"]["best"][result["main_metric"]] = value
    (copy / "result.json").write_text(json.dumps(result))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"].update(data or {})
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    return copy


@pytest.mark.parametrize(("task", "metrics"), [("axb", {"matthews"}), ("axg", {"accuracy", "gender_parity"})])
def test_an_adapter_of_rte_answers_a_diagnostic(
    task: str,
    metrics: set[str],
    runs: dict[str, Path],
    benchmark_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, rows = FILES[task]
    folder = benchmark_folder / Path(name).stem
    adapter = runs["rte"] / "adapter"
    capsys.readouterr()
    assert gpc("evaluate", adapter, "--task.name", task, "--data.path", folder) == EXIT_DONE
    found = json.loads(capsys.readouterr().out)
    assert (found["task"], found["examples"]) == (task, len(rows))
    assert found["metrics"].keys() == {*metrics, "loss"}
    words = ("--task.name", task, "--input", folder / name, "--output", tmp_path)
    assert gpc("predict", adapter, *words) == EXIT_DONE
    check_submitted(task, (tmp_path / name).read_text(), rows)


def test_a_diagnostic_takes_no_other_adapter_and_no_other_data(
    runs: dict[str, Path], benchmark_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = runs["boolq"] / "adapter"
    words = ("--task.name", "axg", "--data.path", benchmark_folder / "AX-g")
    assert gpc("evaluate", other, *words) == EXIT_USAGE
    assert (
        "axg is answered by adapters of task rte, and this one is of task 'boolq'" in capsys.readouterr().err
    )
    # RTE's validation rows have the columns of AX-g
    assert gpc("evaluate", runs["rte"] / "adapter", "--task.name", "axg") == EXIT_USAGE
    assert "AX-g.jsonl" in capsys.readouterr().err


def test_predictions_for_the_test_split_of_the_run(runs: dict[str, Path], tmp_path: Path) -> None:
    assert gpc("predict", runs["cb"] / "adapter", "--output", tmp_path) == EXIT_DONE
    check_submitted("cb", (tmp_path / "CB.jsonl").read_text(), rows_of("cb", "test"))


def test_a_whole_submission(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = with_figure(runs["cb"], tmp_path / "worse", -1.0)
    output = tmp_path / "superglue.zip"
    (tmp_path / "notes.txt").touch()
    given = [worse, *runs.values(), tmp_path / "notes.txt"]
    assert gpc("submission", *given, "--output", output) == EXIT_DONE
    said, warned = capsys.readouterr()
    assert "missing" not in said
    assert str(runs["cb"]) in said
    assert str(worse) not in said
    assert "notes.txt is not a folder" in warned
    assert "and the benchmark asks for 3245" in warned
    with zipfile.ZipFile(output) as archive:
        assert archive.namelist() == [file_name(task) for task in LINES]
        assert archive.testzip() is None
        for task in LINES:
            rows = FILES[task][1] if task in FILES else rows_of(task, "test")
            check_submitted(task, archive.read(file_name(task)).decode(), rows)
    assert gpc("submission", runs["cb"], "--output", output) == EXIT_DONE  # its own file, which it replaces
    with zipfile.ZipFile(output) as archive:
        assert archive.namelist() == ["CB.jsonl"]


def test_what_is_missing_is_said(
    runs: dict[str, Path], benchmark_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in ("RTE", "AX-b"):
        (tmp_path / "data" / task).mkdir(parents=True)
    write_rows(tmp_path / "data" / "RTE" / "test.jsonl", rows_of("rte", "test"))
    write_rows(tmp_path / "data" / "AX-b" / "AX-b.jsonl", FILES["axb"][1])
    output = tmp_path / "superglue.zip"
    words = ("--data", tmp_path / "data", "--output", output)
    assert gpc("submission", runs["rte"], runs["wsc"], *words) == EXIT_DONE
    with zipfile.ZipFile(output) as archive:
        assert archive.namelist() == ["RTE.jsonl", "AX-b.jsonl"]
    said = capsys.readouterr().out
    assert "  BoolQ.jsonl: no run of task boolq was given" in said
    assert "  WSC.jsonl: data.path " in said
    assert "  AX-g.jsonl: " in said
    assert gpc("submission", runs["wsc"], *words) == EXIT_USAGE
    assert "nothing to submit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [("mine.zip", "is there already, and no submission that gpc-dist wrote"), ("out", "give out.zip")],
)
def test_an_output_that_is_not_its_own(
    name: str,
    message: str,
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("mine.zip", "w") as archive:
        archive.writestr("RTE.jsonl", "mine")
    before = Path("mine.zip").read_bytes()
    assert gpc("submission", runs["rte"], "--output", name) == EXIT_USAGE
    assert message in capsys.readouterr().err
    assert Path("mine.zip").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["mine.zip"]


def test_runs_that_cannot_be_compared(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lucky = with_figure(runs["rte"], tmp_path / "lucky", 1.0, {"limit_eval": 1})
    words = ("--output", tmp_path / "superglue.zip")
    assert gpc("submission", runs["rte"], lucky, *words) == EXIT_USAGE
    assert "(accuracy; accuracy data.limit_eval 1), so none is the best" in capsys.readouterr().err
    assert gpc("submission", runs["rte"], *words, "--data.path", tmp_path) == EXIT_USAGE
    assert "--data.path cannot be one for all tasks" in capsys.readouterr().err


def test_on_two_ranks(runs: dict[str, Path], tmp_path: Path) -> None:
    one, two = tmp_path / "one.zip", tmp_path / "two.zip"
    given = (runs["rte"], runs["copa"], "--output")
    assert gpc("submission", *given, one) == EXIT_DONE
    assert gpc("submission", *given, two, "--engine.ranks", 2, "--engine.zero_stage", 3) == EXIT_DONE
    assert two.read_bytes() == one.read_bytes()
