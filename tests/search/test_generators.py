"""The trials that Ray Tune is given: those of a search that goes on are those of one that was not cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.tune.experiment import Experiment, Trial

from gpc_dist.search import algorithm, spec
from gpc_dist.search.past import Evaluation, Past, PastTrial
from gpc_dist.search.space import settings_of
from gpc_dist.search.spec import SearchSpec
from gpc_dist.search.trial import NAME, SAMPLE, name_for_tune, sample_of, seed_group, seed_of
from gpc_dist.search.trial_files import TrialRecord

METRIC = "val/accuracy"

SPACE = """
recipe: cb
space:
  train.lr: {loguniform: [1.0e-3, 1.0e-1]}
  adapter.cell: [residual, gated]
  adapter.cell_rank: {choice: [2, 4], when: {adapter.cell: gated}}
"""
LISTED = """
recipe: cb
configurations: [{train.lr: 0.1}, {train.lr: 0.2, train.warmup: 0.5}, {train.betas: [0.8, 0.9]}]
"""


def load(tmp_path: Path, text: str, **overrides: Any) -> SearchSpec:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return spec.load(str(path), {key: str(value) for key, value in overrides.items()})


class Driver:
    """As much of Ray Tune's controller as trials come from."""

    def __init__(self, search: SearchSpec, place: Path, past: Past, concurrent: int):
        self._search = search
        self.source = algorithm.searcher(search, METRIC, "max", concurrent, past)
        experiment = Experiment(
            "trials",
            run=lambda _: None,
            config=algorithm.param_space(search, past),
            num_samples=algorithm.samples(search),
            storage_path=str(place),
            trial_name_creator=name_for_tune,
        )
        self.source.add_configurations([experiment])
        self.trials: list[Trial] = []

    def ask(self) -> list[Trial]:
        """All that come before one of them ends."""
        new = []
        while not self.source.is_finished() and (trial := self.source.next_trial()) is not None:
            new.append(trial)
        self.trials += new
        return new

    def end(self, trial: Trial) -> None:
        trial.set_status(Trial.TERMINATED)
        self.source.on_trial_complete(trial.trial_id, result={METRIC: value_of(self.drawn(trial))})

    def drawn(self, trial: Trial) -> dict[str, Any]:
        sample = sample_of(trial.config)
        return {key: sample[key] for key in self._search.tried_keys if key in sample}

    def record(self, trial: Trial, decision: str = "running", **changed: Any) -> PastTrial:
        number, drawn = int(str(trial)), self.drawn(trial) | changed
        made = TrialRecord("mine", trial.trial_id, number, seed_group(drawn), settings_of(drawn))
        seed = seed_of(trial.config, self._search)
        whole = TrialRecord(**{**vars(made), "seed": seed, "decision": decision})
        return PastTrial(whole, (Evaluation(1.0, 4, 0.0), Evaluation(2.0, 8, value_of(drawn))))

    def found(self) -> dict[int, tuple[str, int]]:
        """What each trial is to do."""
        return {
            int(str(trial)): (seed_group(self.drawn(trial)), seed_of(trial.config, self._search))
            for trial in self.trials
        }


def value_of(drawn: dict[str, Any]) -> float:
    return -abs(float(drawn["train.lr"]) - 0.03)


def whole(search: SearchSpec, place: Path) -> Driver:
    """One trial after the other, to the end."""
    driver = Driver(search, place, {}, concurrent=1)
    while new := driver.ask():
        for trial in new:
            driver.end(trial)
    return driver


SEARCHES = {
    "random": (SPACE, {"trials": 8, "seeds": [3, 5], "seed": 4}),
    "listed": (LISTED, {"seeds": [1, 0]}),
    "optuna": (SPACE, {"trials": 16, "algorithm": "optuna", "seed": 4}),
    "optuna-seeds": (SPACE, {"trials": 14, "seeds": [3, 5], "algorithm": "optuna"}),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_that_goes_on_tries_what_it_would_have_tried(tmp_path: Path, name: str) -> None:
    text, overrides = SEARCHES[name]
    if name == "listed":
        text = text.replace("{train.betas: [0.8, 0.9]}", "{train.lr: 0.3, train.betas: [0.8, 0.9]}")
    search = load(tmp_path, text, **overrides)
    before = whole(search, tmp_path)
    total = algorithm.trials(search)
    assert sorted(before.found()) == list(range(total))
    begun = before.trials[: total - total // 4]
    past = {int(str(trial)): before.record(trial, "completed") for trial in begun[:-1]}
    past[len(begun) - 1] = before.record(begun[-1])
    after = Driver(search, tmp_path, past, concurrent=1)
    first = after.ask()
    assert [int(str(trial)) for trial in first] == list(range(len(begun)))
    assert [trial.status for trial in first] == ["TERMINATED"] * len(past.keys() - {len(begun) - 1}) + [
        "PENDING"
    ]
    assert first[0].metric_analysis[METRIC]["max"] == max(0.0, value_of(before.drawn(begun[0])))
    assert first[0].last_result["step"] == 8
    after.end(first[-1])
    while new := after.ask():
        for trial in new:
            after.end(trial)
    assert after.found() == before.found()
    assert after.source.is_finished()


def test_what_population_based_training_changed_is_kept(tmp_path: Path) -> None:
    search = load(tmp_path, SPACE, trials=3, seeds=[3, 5])
    before = whole(search, tmp_path)
    settings = {"train.lr": 0.5, "adapter.cell": "residual"}
    record = before.record(before.trials[1]).record
    copied = PastTrial(TrialRecord(**{**vars(record), "seed": 3, "settings": settings}), ())
    after = Driver(search, tmp_path, {1: copied}, concurrent=9)
    after.ask()
    assert settings_of(after.drawn(after.trials[1])) == settings
    assert seed_of(after.trials[1].config, search) == 3
    others = {number: found for number, found in before.found().items() if number != 1}
    assert {number: found for number, found in after.found().items() if number != 1} == others


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_no_more_trials_go_on_at_once_than_may(tmp_path: Path, kind: str) -> None:
    """Those that failed go on too, and there may be many of them."""
    search = load(tmp_path, SPACE, trials=8, algorithm=kind)
    before = whole(search, tmp_path)
    decisions = ["failed", "failed", "failed", "completed", "failed"]
    past = {
        number: before.record(trial, decision)
        for number, (trial, decision) in enumerate(zip(before.trials, decisions, strict=False))
    }
    after = Driver(search, tmp_path, past, concurrent=2)
    assert [int(str(trial)) for trial in after.ask()] == [3, 0, 1]
    after.end(after.trials[1])
    assert [int(str(trial)) for trial in after.ask()] == [2]
    for trial in after.trials[2:]:
        after.end(trial)
    assert [int(str(trial)) for trial in after.ask()] == [4, 5]
    after.source.set_finished()
    assert after.ask() == []


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_trials_of_a_search_that_is_to_end_do_not_go_on(tmp_path: Path, kind: str) -> None:
    search = load(tmp_path, SPACE, trials=3, algorithm=kind)
    before = whole(search, tmp_path)
    past = {number: before.record(trial) for number, trial in enumerate(before.trials)}
    after = Driver(search, tmp_path, past, concurrent=1)
    assert not after.source.is_finished()
    after.source.set_finished()
    assert after.source.is_finished()


def test_optuna_keeps_what_was_tried_although_it_would_draw_otherwise(tmp_path: Path) -> None:
    search = load(tmp_path, SPACE, trials=4, algorithm="optuna", seed=4)
    before = whole(search, tmp_path)
    other = before.drawn(before.trials[1]) | {"train.lr": 0.0123}
    past = {1: before.record(before.trials[1], "completed", **other)}
    after = Driver(search, tmp_path, past, concurrent=1)
    while new := after.ask():
        for trial in new:
            after.end(trial)
    assert after.drawn(after.trials[0]) == other  # which has ended
    others = {number: found for number, found in before.found().items() if number != 1}
    assert others.items() <= after.found().items()


def test_trials_of_several_searches_stand_by_whom_they_can_share_a_pack_with(tmp_path: Path) -> None:
    text = """
recipe: demo
configurations: [{adapter.prompt_tokens: 3}, {adapter.prompt_tokens: 4, train.lr: 0.1}]
seeds: [1, 2]
"""
    one, other = (load(tmp_path, text, **{"name": name}) for name in ("one", "other"))
    record = TrialRecord("other", "x", 1, "1", {"adapter.prompt_tokens": 3}, 2, decision="completed")
    past = {1: PastTrial(record, (Evaluation(1.0, 4, 0.5),))}
    space, begun = algorithm.joint_space({"one": (one, {}), "other": (other, past)})
    samples = space[SAMPLE]["grid_search"]
    assert [sample[NAME] for sample in samples] == [
        *("one/000", "one/001", "other/000", "other/001"),
        *("one/002", "one/003", "other/002", "other/003"),
    ]
    assert [sample["run.seed"] for sample in samples] == [1, 2] * 4
    assert begun.keys() == {3}
    assert (begun[3].record, begun[3].evaluations) == (record, ())
    experiment = Experiment(
        "trials",
        run=lambda _: None,
        config=space,
        storage_path=str(tmp_path),
        trial_name_creator=name_for_tune,
    )
    source = algorithm.searcher(one, "", "", 8, begun)
    source.add_configurations([experiment])
    made = [str(source.next_trial()) for _ in samples]
    assert made[0] == "other/001"  # what has ended is handed out first
    assert sorted(made) == sorted(sample[NAME] for sample in samples)
