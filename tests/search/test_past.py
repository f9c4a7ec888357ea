"""What a search that goes on reads of itself."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gpc_dist import files
from gpc_dist.errors import UserError
from gpc_dist.runs.folder import SearchFolder
from gpc_dist.search import spec
from gpc_dist.search.algorithm import stop_rules
from gpc_dist.search.past import Evaluation, read_past, read_spent_s, spent_file
from gpc_dist.search.trial_files import TrialRecord, trial_folder, write_trial


def record(number: int, **values: Any) -> TrialRecord:
    return TrialRecord("mine", f"abcde_{number:05d}", number, "12345678", {"train.lr": 0.1}, **values)


def test_trials_are_read_with_their_evaluations(tmp_path: Path) -> None:
    folder = SearchFolder(tmp_path)
    write_trial(folder, record(0, seed=3, lane=1, host="node", decision="completed"))
    trial_folder(folder, 0).write_status("finished")
    write_trial(folder, record(2))
    files.write_json(trial_folder(folder, 1).trial, {"decision": "failed"})  # before it had begun
    write_trial(folder, record(7))  # of no trial of this search
    lines = [
        {"step": 2, "time_s": 5.5, "train/loss": 1.0},
        {"step": 4, "time_s": 6, "val/accuracy": 0.25},
        {"step": 6, "time_s": 7.0, "val/accuracy": None},
        {"step": 8, "time_s": 8.0, "val/accuracy": "0.5"},
        {"step": 9, "val/accuracy": 0.5},
        {"step": 10, "time_s": 9.0, "val/accuracy": 0.75},
    ]
    file = trial_folder(folder, 0).metrics
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12, "time_s"')
    past = read_past(folder, 4, "val/accuracy")
    assert sorted(past) == [0, 2]
    assert past[0].record == record(0, seed=3, lane=1, host="node", decision="completed")
    assert past[0].evaluations == (Evaluation(6, 4, 0.25), Evaluation(9.0, 10, 0.75))
    assert (past[0].ended, past[2].ended) == (True, False)
    assert past[2].evaluations == ()


@pytest.mark.parametrize(
    ("decision", "state", "ended"),
    [
        ("completed", "finished", True),
        ("stopped by scheduler", "stopped", True),
        ("stopped by scheduler", "running", False),
        ("stopped by scheduler", "killed", False),
        ("running", "stopped", False),
    ],
)
def test_a_trial_that_was_being_stopped_has_not_ended(
    tmp_path: Path, decision: str, state: Any, ended: bool
) -> None:
    """Without the result of its run it could not be the best one."""
    folder = SearchFolder(tmp_path)
    write_trial(folder, record(0, decision=decision))
    trial_folder(folder, 0).write_status(state)
    assert read_past(folder, 1, "val/accuracy")[0].ended == ended


def test_a_record_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    folder = SearchFolder(tmp_path)
    older = asdict(record(0, decision="failed"))
    del older["seed"], older["copied"], older["heard"]
    files.write_json(trial_folder(folder, 0).trial, older)
    (past,) = read_past(folder, 1, "val/accuracy").values()
    assert past.record == record(0, decision="failed")
    assert not past.ended


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"settings": [1]}, "settings: input should be a valid dictionary"),
        ({"seed": "three"}, "seed: input should be a valid integer"),
        ({"decision": None}, "decision: input should be a valid string"),
        ({"number": 1}, "is the record of trial 1"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    folder = SearchFolder(tmp_path)
    file = trial_folder(folder, 0).trial
    files.write_json(file, asdict(record(0)) | values)
    with pytest.raises(UserError, match=said) as caught:
        read_past(folder, 1, "val/accuracy")
    assert str(file) in str(caught.value)
    assert "restore or remove it" in str(caught.value)


def test_the_time_of_a_search_counts_over_its_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, limit = SearchFolder(tmp_path), spec.load("cb-asha", {"stop.max_s": "100"})
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)

    def start() -> Any:
        (rule,) = stop_rules(limit, "val/average", "max", folder)
        assert not rule.stop_all()  # from here on it counts
        return rule

    first = start()
    now += 9.0
    assert not first.stop_all()
    assert not spent_file(folder).exists()
    now += 31.0
    assert not first.stop_all()
    assert read_spent_s(folder) == 40.0
    now += 500.0  # until it goes on
    second = start()
    now += 59.0
    assert not second.stop_all()
    now += 1.0
    assert second.stop_all()
    assert read_spent_s(folder) == 100.0
    (third,) = stop_rules(limit, "val/average", "max", folder)
    assert third.stop_all()


@pytest.mark.parametrize("value", ["60", None, True, -1.0])
def test_a_damaged_time_is_refused(tmp_path: Path, value: Any) -> None:
    folder = SearchFolder(tmp_path)
    files.write_json(spent_file(folder), {"spent_s": value})
    with pytest.raises(UserError, match="no number of seconds: restore or remove it"):
        read_spent_s(folder)
