"""What is held out of the training split: disjoint, complete, stratified, and the same for every run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gpc_dist.config import DataConfig, TaskConfig
from gpc_dist.errors import UserError
from gpc_dist.tasks import Example, make_task, read_part, selection_part
from gpc_dist.tasks.example import Target
from gpc_dist.tasks.holdout import hold_out


def examples(*targets: Target) -> list[Example]:
    return [Example(n, ((f"text {n}", None),), target) for n, target in enumerate(targets)]


def ids(found: list[Example]) -> list[Any]:
    return [example.id for example in found]


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.9])
@pytest.mark.parametrize("targets", [[0, 1, 1] * 40, [0.1 * n for n in range(120)], [(0,), (1,)] * 60])
def test_every_example_is_in_one_part_and_in_order(targets: list[Any], share: float) -> None:
    whole = examples(*targets)
    rest, held = hold_out(whole, share)
    assert sorted(ids(rest) + ids(held)) == ids(whole)
    assert ids(rest) == sorted(ids(rest))
    assert ids(held) == sorted(ids(held))
    assert len(held) == pytest.approx(share * 120, abs=1)
    assert ids(held) != list(range(len(held)))  # no mere beginning
    assert hold_out(whole, share) == (rest, held)


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_every_class_gives_its_share(share: float) -> None:
    whole = examples(*([0] * 200 + [1] * 40 + [2] * 8))
    held = Counter(example.target for example in hold_out(whole, share)[1])
    assert held == {0: 200 * share, 1: 40 * share, 2: round(8 * share)}


def test_the_questions_on_one_source_stay_together() -> None:
    whole = [Example(n, (("p", "q"),), n % 2, source=n // 7) for n in range(140)]
    rest, held = hold_out(whole, 0.2)
    assert {e.source for e in rest}.isdisjoint(e.source for e in held)
    assert len({e.source for e in held}) == 4


@pytest.mark.parametrize(("share", "left"), [(0.01, "none to select on"), (0.99, "none to train on")])
def test_a_share_that_leaves_a_part_empty_is_refused(share: float, left: str) -> None:
    with pytest.raises(UserError, match=rf"data.holdout {share} of 4 training examples .* leaves {left}"):
        hold_out(examples(0, 0, 0, 0), share)


def table(folder: Path, **data: Any) -> tuple[Any, DataConfig]:
    config = DataConfig(path=str(folder), **data)
    return make_task(TaskConfig(name="mine", text=["text"], label="label", labels=["a", "b"]), config), config


@pytest.fixture
def folder(write_rows: Any) -> Path:
    rows = [{"text": f"row {n}", "label": "ab"[n % 2]} for n in range(60)]
    return write_rows(train=rows, validation=rows[:5])


def test_limits_apply_after_the_holdout(folder: Path) -> None:
    task, data = table(folder, holdout=0.5, limit_train=10, limit_eval=7)
    trained = [ids(read_part(task, data, "train", seed)) for seed in (1, 1, 2)]
    held = ids(read_part(task, data, "holdout"))
    assert trained[0] == trained[1] != trained[2]
    assert [len(part) for part in trained] == [10, 10, 10]
    whole = table(folder, holdout=0.5)
    assert held == ids(read_part(*whole, "holdout"))[:7]
    assert not set(ids(read_part(*whole, "holdout"))) & {n for part in trained for n in part}


def test_the_holdout_takes_the_place_of_the_validation_split(folder: Path) -> None:
    task, data = table(folder, holdout=0.25)
    assert selection_part(data) == "holdout"
    assert len(read_part(task, data, "holdout")) == 16  # 7.5 of each class, rounded
    assert len(read_part(task, data, "validation")) == 5
    (folder / "validation.jsonl").unlink()
    assert len(read_part(task, data, "train")) == 44


def test_without_a_holdout_there_is_none(folder: Path) -> None:
    task, data = table(folder)
    assert selection_part(data) == "validation"
    assert len(read_part(task, data, "train")) == 60
    with pytest.raises(UserError, match="nothing is held out"):
        read_part(task, data, "holdout")


def test_passages_of_the_official_multirc_stay_whole(superglue: Path) -> None:
    data = DataConfig(path=str(superglue / "MultiRC"), holdout=0.1)
    task = make_task(TaskConfig(name="multirc"), data)
    passages = [{e.rows[0][0] for e in read_part(task, data, part)} for part in ("train", "holdout")]  # type: ignore[arg-type]
    assert passages[0].isdisjoint(passages[1])
    assert (len(passages[0] | passages[1]), len(passages[1])) == (456, 46)
