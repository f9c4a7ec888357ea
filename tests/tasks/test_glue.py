"""SST-2 and CoLA, from rows as the files and the Hub have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef

from gpc_dist.config import DataConfig, TaskConfig
from gpc_dist.errors import UserError
from gpc_dist.tasks import Example, Task, make_task, write_predictions
from gpc_dist.tasks.glue import SPECS
from gpc_dist.tasks.packaged import adapt_rows
from gpc_dist.tasks.read import the_input

COUNTS = {"cola": (8551, 1043), "sst2": (67349, 872)}
BASELINES = {"cola": {"matthews": 0.0}, "sst2": {"accuracy": pytest.approx(444 / 872)}}


def glue_task(name: str, folder: Path | None = None) -> Task:
    return make_task(TaskConfig(name=name), DataConfig(path=None if folder is None else str(folder)))


@pytest.mark.parametrize(
    ("name", "label"),
    [("cola", 1), ("cola", "1"), ("cola", "acceptable"), ("sst2", 1), ("sst2", "1"), ("sst2", "positive")],
)
def test_rows(name: str, label: int | str) -> None:
    rows = [{"sentence": "It fell.", "label": label, "idx": 4}, {"sentence": "It felled.", "label": -1}]
    assert adapt_rows(name, rows, the_input(rows)) == [
        Example(4, (("It fell.", None),), 1),
        Example(1, (("It felled.", None),), None),
    ]


@pytest.mark.parametrize("label", [2, "2", "fine"])
def test_a_wrong_label_is_named(label: int | str) -> None:
    rows = [{"sentence": "s", "label": label}]
    with pytest.raises(UserError, match=r"row 1 of the input: label .* is none of negative, positive"):
        adapt_rows("sst2", rows, the_input(rows))


def test_the_official_tsv_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text('sentence\tlabel\na "fine film\t1\ndull .\t0\n')
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\ta fine film\n")
    task = glue_task("sst2", tmp_path)
    assert [(e.rows[0][0], e.target) for e in task.read("validation")] == [('a "fine film', 1), ("dull .", 0)]
    assert [e.target for e in task.read("test")] == [None]


def test_matthews_correlation_selects_colas_checkpoint() -> None:
    task = glue_task("cola")
    assert (task.main_metric, task.metric_names, task.greater_is_better) == ("matthews", ("matthews",), True)
    random = np.random.default_rng(0)
    right, logits = random.integers(0, 2, 50), random.standard_normal((50, 2))
    examples = [Example(n, (("s", None),), int(target)) for n, target in enumerate(right)]
    scores = task.score(examples, list(logits))
    assert scores == {"matthews": pytest.approx(matthews_corrcoef(right, logits.argmax(1)))}
    assert task.score(examples, [np.array([0.0, 1.0])] * 50) == {"matthews": 0.0}


@pytest.mark.parametrize("name", SPECS)
def test_the_official_rows(name: str, glue: Path) -> None:
    task = glue_task(name, glue / name)
    train, validation = task.read("train"), task.read("validation")
    assert (len(train), len(validation)) == COUNTS[name]
    assert {example.target for example in train} == {0, 1}
    assert task.majority_baseline(train, validation) == BASELINES[name]


@pytest.mark.parametrize(("name", "file"), [("sst2", "SST-2.tsv"), ("cola", "CoLA.tsv")])
def test_predictions_are_in_glues_format(tmp_path: Path, name: str, file: str) -> None:
    examples = [Example(idx, (("s", None),)) for idx in (7, 3, 5)]
    outputs: list[Any] = [np.array([0.0, 1.0]), np.array([1.0, 0.0]), np.array([0.0, 2.0])]
    written = write_predictions(glue_task(name), examples, outputs, tmp_path)
    assert written == tmp_path / file
    assert written.read_text() == "index\tprediction\n0\t1\n1\t0\n2\t1\n"
