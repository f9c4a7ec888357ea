"""What a scheduler knows after a restart."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gpc_dist.runs.folder import SearchFolder
from gpc_dist.search import spec
from gpc_dist.search.algorithm import make_scheduler, stop_rules
from gpc_dist.search.callback import TrialCallback, replay
from gpc_dist.search.trial_files import TrialRecord, read_trial, trial_folder, write_trial
from gpc_dist.training.stop import StopRequest

SETTINGS = {"scheduler.grace_steps": "20", "scheduler.perturb_every": "20"}


@dataclass(frozen=True)
class FakeTrial:
    """As much of Ray Tune's as schedulers look at."""

    trial_id: str
    finished: bool
    error_file: Path = Path()

    def __str__(self) -> str:
        return f"{int(self.trial_id.rpartition('_')[2]):03d}"

    def is_finished(self) -> bool:
        return self.finished


class Controller:
    """As much of Ray Tune's as schedulers ask for here."""

    search_alg = None

    def get_live_trials(self) -> list[FakeTrial]:
        return []


def scheduler(name: str, trials: list[FakeTrial]) -> Any:
    made: Any = make_scheduler(spec.load("cb-asha", {"scheduler.name": name, **SETTINGS}))
    made.set_search_properties("val/average", "max")
    for trial in trials:
        made.on_trial_add(Controller(), trial)
    return made


def drive(told: Any, trials: list[FakeTrial], folder: SearchFolder) -> int:
    """Evaluations at four rungs, in no order of trials, written as runs do; stopped trials make no more. How many."""
    chance, going, count = random.Random(0), list(range(9)), 0
    for step in (20, 40, 60, 80):
        for number in chance.sample(going, len(going)):
            count += 1
            line = {"step": step, "time_s": float(count), "val/average": chance.random()}
            file = folder.trial(f"{number:03d}").metrics
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as lines:
                lines.write(json.dumps({"step": step, "time_s": line["time_s"], "train/loss": 1.0}) + "\n")
                lines.write(json.dumps(line) + "\n")
            if (
                told.on_trial_result(Controller(), trials[number], {**line, "training_iteration": 1})
                == "STOP"
            ):
                going.remove(number)
    assert going
    return count


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_scheduler_decides_after_a_restart_as_it_would_have_before(tmp_path: Path, name: str) -> None:
    trials = [FakeTrial(f"x_{number:05d}", finished=True) for number in range(9)]
    last = FakeTrial("x_00009", finished=False)
    told, again = scheduler(name, [*trials, last]), scheduler(name, [*trials, last])
    count = drive(told, trials, SearchFolder(tmp_path))
    assert replay({"": SearchFolder(tmp_path)}, trials, again, "val/average") == count
    assert again.debug_string() == told.debug_string()
    result = {"step": 20, "val/average": 0.1, "training_iteration": 1}
    assert told.on_trial_result(Controller(), last, dict(result)) == "STOP"
    assert again.on_trial_result(Controller(), last, dict(result)) == "STOP"


def test_each_scheduler_hears_what_it_can_bear(tmp_path: Path) -> None:
    trials = [FakeTrial(f"x_{number:05d}", finished=number > 0) for number in range(9)]
    folder = SearchFolder(tmp_path)
    count = drive(scheduler("asha", trials), trials, folder)
    running = sum("val/" in line for line in folder.trial("000").metrics.read_text().splitlines())
    assert running
    assert replay({"": folder}, trials, scheduler("asha", trials), "val/average") == count
    assert replay({"": folder}, trials[1:], scheduler("median", trials), "val/average") == count - running
    assert replay({"": folder}, trials[:1], scheduler("median", trials), "val/average") == 0
    assert replay({"": folder}, trials, scheduler("pbt", []), "val/average") == 0


def test_a_scheduler_is_not_told_of_what_a_trial_will_report_again(tmp_path: Path) -> None:
    trials = [FakeTrial("x_00000", finished=False), FakeTrial("x_00001", finished=True)]
    folder = SearchFolder(tmp_path)
    for number in range(2):
        write_trial(folder, TrialRecord("mine", "x", number, "1", {}, heard=20))
        lines = [{"step": step, "time_s": float(step), "val/average": 0.5} for step in (20, 40)]
        trial_folder(folder, number).metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert replay({"": folder}, trials, scheduler("asha", trials), "val/average") == 3


@pytest.mark.parametrize(
    ("done", "over", "decision"),
    [(False, False, "running"), (True, False, "stopped by scheduler"), (True, True, "completed")],
)
def test_what_is_decided_is_noted_with_the_evaluation(
    tmp_path: Path, done: bool, over: bool, decision: str
) -> None:
    """In one write: a search that is killed between two would have heard, and not know what to do."""
    folder = SearchFolder(tmp_path)
    write_trial(folder, TrialRecord("mine", "x", 0, "1", {}, heard=0))
    callback = TrialCallback({"": folder}, "val/average", scheduler("asha", []), (), StopRequest())
    trial = FakeTrial("x_00000", finished=False)
    callback.on_trial_result(1, [trial], trial, {"step": 20, "over": over, "done": done})
    record = read_trial(folder, 0)
    assert record is not None
    assert (record.heard, record.decision) == (20, decision)


@pytest.mark.parametrize("state", ["running", "stopped", "failed"])
def test_a_trial_that_lost_its_process_says_why_it_failed(tmp_path: Path, state: Any) -> None:
    """A run that has failed has said so itself."""
    folder, error = SearchFolder(tmp_path / "search"), tmp_path / "error.txt"
    error.write_text("Failure # 1\nTraceback ...\nThe worker died. Worker exit type: SYSTEM_ERROR\n\n")
    trial = FakeTrial("x_00000", finished=False, error_file=error)
    trial_folder(folder, 0).write_status(state, "the loss was not finite" if state == "failed" else "")
    callback = TrialCallback({"": folder}, "val/average", scheduler("asha", []), (), StopRequest())
    callback.on_trial_error(1, [trial], trial)
    status = trial_folder(folder, 0).read_status()
    assert status.state == "failed"
    assert status.reason == ("the loss was not finite" if state == "failed" else "The worker died.")


def test_stop_rules_count_what_was_before(tmp_path: Path) -> None:
    """The best trial ended first; two others have ended since, and one goes on."""
    folder = SearchFolder(tmp_path)
    values = {0: [0.1, 0.9], 1: [0.5], 2: [0.2, 0.3], 3: [0.4]}
    times = {0: [1, 2], 1: [4], 2: [3, 5], 3: [6]}
    trials = [FakeTrial(f"x_{number:05d}", finished=number != 3) for number in values]
    for number, measured in values.items():
        file = folder.trial(f"{number:03d}").metrics
        file.parent.mkdir(parents=True)
        lines = [
            {"step": step, "time_s": time_s, "val/average": value}
            for step, (time_s, value) in enumerate(zip(times[number], measured, strict=True), start=1)
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def over(**stop: Any) -> bool:
        search = spec.load("cb-asha", {f"stop.{key}": str(value) for key, value in stop.items()})
        rules = stop_rules(search, "val/average", "max", folder)
        replay({"": folder}, trials, scheduler("fifo", []), "val/average", rules)
        return any(rule.stop_all() for rule in rules)

    assert [over(patience=count) for count in (1, 2, 3)] == [True, True, False]
    assert [over(threshold=value) for value in (0.9, 0.91)] == [True, False]
