"""SuperGLUE's diagnostics: how their rows are read, who may answer them, and what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpc_dist.config import DataConfig, TaskConfig
from gpc_dist.errors import UserError
from gpc_dist.tasks import Example, Task, make_task, metrics

AXB = [
    {
        "sentence1": "The clerk is not in the office.",
        "sentence2": "The clerk is in the office.",
        "idx": 0,
        "label": "not_entailment",
        "logic": "Negation",
    },
    {"sentence1": "Ann sang and danced.", "sentence2": "Ann sang.", "idx": 1, "label": "entailment"},
    {"sentence1": "Ann sang or danced.", "sentence2": "Ann sang.", "idx": 2, "label": "not_entailment"},
]
_BAKER = "The baker told the guest that {} could pay later."
AXG = [
    {
        "premise": _BAKER.format(pronoun),
        "hypothesis": f"The {who} could pay later.",
        "idx": idx,
        "pair_id": 90 + idx,
        "label": label,
    }
    for idx, (pronoun, who, label) in enumerate(
        [
            ("she", "guest", "entailment"),
            ("he", "guest", "entailment"),
            ("he", "baker", "not_entailment"),
            ("she", "baker", "not_entailment"),
        ]
    )
]
FILES = {"axb": ("AX-b.jsonl", AXB), "axg": ("AX-g.jsonl", AXG)}


def diagnostic(name: str, **data: Any) -> Task:
    return make_task(TaskConfig(name=name), DataConfig(**data))


@pytest.fixture
def folder(write_rows: Any) -> Path:
    write_rows(**{"AX-b": AXB, "AX-g": AXG, "val": AXB})
    found: Path = write_rows(test=AXG)
    return found


def test_rows_are_those_of_the_one_file_whatever_lies_beside_it(folder: Path) -> None:
    axb, axg = (diagnostic(name, path=str(folder)) for name in ("axb", "axg"))
    texts = ("The clerk is not in the office.", "The clerk is in the office.")
    assert axb.read("validation")[0] == Example(0, (texts,), 1)
    assert [e.target for e in axb.read("validation")] == [1, 0, 1]
    pair = axg.read("validation")[:2]
    assert [(e.target, e.group) for e in pair] == [(0, 0), (0, 0)]
    assert [e.target for e in axg.read("test")] == [None] * 4
    # as the Hub has them: class indices, no pair_id
    rows = [{k: v for k, v in row.items() if k != "pair_id"} for row in AXG]
    assert [e.group for e in axg.parse(rows)] == [0, 0, 1, 1]


def test_there_is_nothing_to_train_on(folder: Path) -> None:
    with pytest.raises(UserError, match="axb is a diagnostic and has no training rows: train rte"):
        diagnostic("axb", path=str(folder)).read("train")


def test_a_folder_without_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'AX-b\.jsonl' does not exist"):
        diagnostic("axb", path=str(tmp_path)).read("validation")


def test_metrics(folder: Path) -> None:
    axb, axg = (diagnostic(name, path=str(folder)) for name in ("axb", "axg"))
    assert axb.metric_names == ("matthews",)
    assert axg.metric_names == ("accuracy", "gender_parity")
    entailed, not_entailed = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    all_right = [not_entailed, entailed, not_entailed]
    assert axb.score(axb.read("validation"), all_right) == {"matthews": pytest.approx(1)}
    one_changed = [entailed, not_entailed, not_entailed, not_entailed]
    assert axg.score(axg.read("validation"), one_changed) == {"accuracy": 0.75, "gender_parity": 0.5}
    assert axg.score(axg.read("validation"), [entailed] * 4) == {"accuracy": 0.5, "gender_parity": 1.0}


def test_gender_parity_is_of_whole_pairs() -> None:
    examples = [Example(number, ((".", "."),), 0, group=number // 2) for number in range(3)]
    assert metrics.gender_parity(examples, np.array([0, 1, 1])) == 0.0
    assert metrics.gender_parity(examples[:1], np.array([0])) == 0.0
