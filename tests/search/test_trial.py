"""A trial's process, without Ray: what it takes up, and what it leaves to the next one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from gpc_dist import files
from gpc_dist.distributed import checkpoint
from gpc_dist.runs.folder import SearchFolder
from gpc_dist.search import spec
from gpc_dist.search.packs import Place
from gpc_dist.search.trial import NAME, SAMPLE, SEED, Trial
from gpc_dist.search.trial_files import TrialRecord, read_trial, trial_folder, write_trial
from gpc_dist.training.progress import Event

RECORD = TrialRecord("mine", "abcde_00003", 3, "12345678", {"train.lr": 0.02}, 5, lane=1, host="node")


class Packs:
    """As much of the actor as a trial calls; `ray.get` returns what it is given."""

    def __init__(self, folder: SearchFolder):
        self._folder = folder
        self.asked: list[Any] = []
        self.add = SimpleNamespace(remote=self._add)
        self.next = SimpleNamespace(remote=self._next)

    def _add(
        self, name: str, key: Any, tree: Any, command: Any, state: str | None, heard: int | None
    ) -> Place:
        self.asked.append(
            (name, tree["train"]["lr"], tree["run"]["seed"], state, heard, read_trial(self._folder, 3))
        )
        return Place(0, 2, 0, "other")

    def _next(self, name: str) -> Event:
        return Event(name, 8, {"accuracy": 0.5})


def take_up(folder: SearchFolder, sample: dict[str, Any]) -> Trial:
    """A trial in a new process of a search that goes on."""
    trial = Trial.__new__(Trial)
    trial._trial_info = SimpleNamespace(trial_name="003", trial_id="fedcb_00003")
    trial._searches = {"": (folder, spec.load("cb-asha"))}
    trial._packs = Packs(folder)
    trial._take_up({SAMPLE: sample})
    return trial


@pytest.mark.parametrize("copied", [True, False])
def test_a_trial_goes_on_from_the_state_that_it_was_to_take_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    """Cut off after it got another trial's values, before or after its run began from that one's state."""
    monkeypatch.setattr(ray, "get", lambda found: found)
    folder = SearchFolder(tmp_path)
    state = trial_folder(folder, 3).path / "started-from"
    checkpoint.save(state, checkpoint.Checkpoint(8, {}, [], {}))
    before = replace(RECORD, copied=copied, heard=4)
    write_trial(folder, before)
    trial = take_up(folder, {"train.lr": 0.02, SEED: 5})
    trial._join()
    ((name, rate, seed, start_from, heard, written),) = trial._packs.asked
    assert (name, rate, seed) == ("003", 0.02, 5)
    assert heard == (8 if copied else 4)  # what was evaluated of that state was the other trial
    assert start_from == (str(state / "step-00000008") if copied else None)
    # it keeps its id in all records, and until its run has begun, that it is to take something over
    assert (written.trial, written.seed, written.copied) == ("abcde_00003", 5, copied)
    after = read_trial(folder, 3)
    assert after is not None
    assert (after.trial, after.copied, after.lane, after.host) == ("abcde_00003", False, 2, "other")


def test_a_new_trial_has_the_id_that_ray_gave_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda found: found)
    folder = SearchFolder(tmp_path)
    trial = take_up(folder, {"train.lr": 0.02, SEED: 5})
    trial._join()
    assert files.read_json(trial_folder(folder, 3).trial)["trial"] == "fedcb_00003"
    assert trial._packs.asked[0][3] is None


def test_a_trial_of_several_searches_takes_up_what_its_own_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each search has a trial with this number."""
    monkeypatch.setattr(ray, "get", lambda found: found)
    folders = {name: SearchFolder(tmp_path / name) for name in ("one", "other")}
    trial = take_up(folders["other"], {"train.lr": 0.02, SEED: 5})
    trial._searches = {
        name: (folder, spec.load("cb-asha", {"name": name})) for name, folder in folders.items()
    }
    trial._lane_name, trial._visit, left = "one/003", 7, []
    trial._packs.leave = SimpleNamespace(remote=lambda *given: left.append(given))
    trial._trial_info = SimpleNamespace(trial_name="other/003", trial_id="fedcb_00017")
    assert trial.reset_config({SAMPLE: {"train.lr": 0.01, SEED: 6, NAME: "other/003"}})
    # by the name of the one before, when Ray Tune has given the process that of the next
    assert left == [("one/003", 7, "stopped by the search")]
    trial._join()
    assert trial._packs.asked[0][:3] == ("other/003", 0.01, 6)
    record = read_trial(folders["other"], 3)
    assert record is not None
    assert (record.search, record.number, record.seed) == ("other", 3, 6)
    assert not trial_folder(folders["one"], 3).trial.exists()


@pytest.mark.parametrize(("decision", "heard"), [("running", 8), ("stopped by scheduler", 0)])
def test_a_trial_that_was_being_stopped_reports_its_last_evaluation_and_that_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decision: str, heard: int
) -> None:
    monkeypatch.setattr(ray, "get", lambda found: found)
    folder = SearchFolder(tmp_path)
    write_trial(folder, replace(RECORD, heard=8, decision=decision))
    trial = take_up(folder, {"train.lr": 0.02, SEED: 5})
    stopped = decision != "running"
    assert trial.step() == {"val/accuracy": 0.5, "step": 8, "over": False, "done": stopped}
    assert trial._packs.asked[0][4] == heard


def test_a_trial_does_not_fail_for_the_one_whose_process_it_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "get", lambda found: found)
    trial = take_up(SearchFolder(tmp_path), {"train.lr": 0.02, SEED: 5})
    trial._join()

    def leave(*_: Any) -> None:
        raise OSError("the disk is full")

    trial._packs.leave = SimpleNamespace(remote=leave)
    trial._trial_info = SimpleNamespace(trial_name="004", trial_id="fedcb_00004")
    assert trial.reset_config({SAMPLE: {"train.lr": 0.01, SEED: 6}})
    assert (trial._number, trial._seed, trial._visit) == (4, 6, None)
