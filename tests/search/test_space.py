"""The space of a search: refusals, and what Ray Tune and Optuna draw from it."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from gpc_dist import config
from gpc_dist.errors import UserError
from gpc_dist.search import space
from gpc_dist.search.pack_key import pack_key
from gpc_dist.search.spec import SearchSpec


def make(searched: dict[str, Any], **others: Any) -> SearchSpec:
    if others.get("algorithm") != "grid":
        others.setdefault("trials", 4)
    return SearchSpec.model_validate({"recipe": "demo", "space": searched} | others)


EVERY_KIND: dict[str, Any] = {
    "train.lr": {"loguniform": [1e-3, 1e-1]},
    "train.weight_decay": {"uniform": [0, 0.1]},
    "train.batch_size": {"int": [15, 17]},
    "adapter.prompt_tokens": {"logint": [4, 6]},
    "adapter.prompt_init": ["vocab", "labels"],
    "train.betas": {"choice": [[0.9, 0.999], [0.9, 0.98]]},
    "train.clip_norm": [None, 1.0],
}

CHAIN: dict[str, Any] = {
    "adapter.cell_rank": {"choice": [4, 8], "when": {"adapter.cell": ["residual", "recurrent"]}},
    "adapter.cell": {"choice": ["gated", "residual", "recurrent"], "when": {"adapter.method": "gpc"}},
    "adapter.method": ["gpc", "prompt-tuning"],
}
"""Children stand before their parents on purpose."""


def from_ray(spec: SearchSpec, trials: int = 1) -> list[dict[str, Any]]:
    from ray.tune.experiment import Experiment
    from ray.tune.search.basic_variant import BasicVariantGenerator

    generator = BasicVariantGenerator(random_state=spec.seed)
    experiment = Experiment("x", run=lambda _: None, config=space.to_ray(spec), num_samples=trials)
    generator.add_configurations([experiment])
    return [trial.config for trial in iter(generator.next_trial, None)]


def from_optuna(spec: SearchSpec, trials: int) -> list[dict[str, Any]]:
    from ray.tune.search.optuna import OptunaSearch

    searcher = OptunaSearch(space.to_optuna(spec), metric="m", mode="max", seed=spec.seed)
    samples = []
    for number in range(trials):
        samples.append(searcher.suggest(str(number)))
        searcher.on_trial_complete(str(number), {"m": random.Random(number).random()})
    return samples


def draw(spec: SearchSpec, trials: int) -> list[dict[str, Any]]:
    return from_optuna(spec, trials) if spec.algorithm == "optuna" else from_ray(spec, trials)


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_every_distribution_draws_what_it_says(algorithm: str) -> None:
    spec = make(EVERY_KIND, algorithm=algorithm)
    space.validate(spec)
    samples = [space.settings_of(sample) for sample in draw(spec, 60)]
    drawn = {key: [sample[key] for sample in samples] for key in EVERY_KIND}
    assert all(1e-3 <= value <= 1e-1 for value in drawn["train.lr"])
    assert all(0 <= value <= 0.1 for value in drawn["train.weight_decay"])
    assert set(drawn["train.batch_size"]) == {15, 16, 17}
    assert set(drawn["adapter.prompt_tokens"]) == {4, 5, 6}
    assert set(drawn["adapter.prompt_init"]) == {"vocab", "labels"}
    assert {tuple(value) for value in drawn["train.betas"]} == {(0.9, 0.999), (0.9, 0.98)}
    assert set(drawn["train.clip_norm"]) == {None, 1.0}
    for sample in samples:
        assert space.trial_config(spec, sample).train.lr == sample["train.lr"]


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_a_logarithmic_range_has_as_many_draws_in_each_decade(algorithm: str) -> None:
    ranges = {
        "train.lr": {"loguniform": [1e-6, 1]},
        "adapter.prompt_tokens": {"logint": [1, 10_000]},
        "train.weight_decay": {"uniform": [0, 1]},
        "train.batch_size": {"int": [1, 10_000]},
    }
    drawn = draw(make(ranges, algorithm=algorithm), 10)  # Optuna learns from what it has drawn later on
    # one in a hundred is as small where every value is as likely as any other
    small = {
        key: sum(each[key] <= high / 100 for each in drawn)
        for key, held in ranges.items()
        for _, high in held.values()
    }
    assert small["train.lr"] >= 4
    assert small["adapter.prompt_tokens"] >= 2
    assert small["train.weight_decay"] + small["train.batch_size"] <= 1


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_a_key_is_set_only_where_its_conditions_hold(algorithm: str) -> None:
    spec = make(CHAIN, algorithm=algorithm)
    space.validate(spec)
    seen = set()
    for sample in draw(spec, 60):
        settings = space.settings_of(sample)
        method, cell, rank = (settings.get(f"adapter.{name}") for name in ("method", "cell", "cell_rank"))
        assert (cell is not None) == (method == "gpc")
        assert (rank is not None) == (cell in ("residual", "recurrent"))
        seen.add((method, cell, rank))
    assert len(seen) == 6


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_the_same_seed_draws_the_same(algorithm: str) -> None:
    first, second, other = (make(EVERY_KIND | CHAIN, algorithm=algorithm, seed=seed) for seed in (1, 1, 2))
    assert draw(first, 8) == draw(second, 8)
    assert draw(first, 8) != draw(other, 8)


def test_a_grid_has_every_combination_once() -> None:
    spec = make(CHAIN | {"train.lr": {"grid": [0.1, 0.2]}}, algorithm="grid")
    space.validate(spec)
    samples = [space.settings_of(sample) for sample in from_ray(spec)]
    assert len(samples) == space.count(spec) == 12
    assert len({tuple(sorted(sample.items())) for sample in samples}) == 12
    assert sum("adapter.cell_rank" in sample for sample in samples) == 8


def test_a_random_search_draws_for_each_point_of_its_grid() -> None:
    spec = make({"train.lr": {"uniform": [0.1, 0.2]}, "adapter.cell": {"grid": ["gated", "residual"]}})
    space.validate(spec)
    samples = from_ray(spec, 4)
    assert len(samples) == space.count(spec) == 8
    assert sum(sample["adapter.cell"] == "gated" for sample in samples) == 4


def test_a_condition_on_a_fixed_key_holds_for_all_trials_or_none() -> None:
    searched = {
        "train.lr": [0.1, 0.2],
        "adapter.cell": {"choice": ["gated"], "when": {"adapter.method": "gpc"}},
    }
    assert "adapter.cell" in space.to_ray(make(searched))
    without = make(searched, settings={"adapter.method": "linear-probe"})
    space.validate(without)
    assert set(space.to_ray(without)) == {"train.lr"}
    assert set(from_optuna(without, 1)[0]) == {"train.lr"}


@pytest.mark.parametrize(
    ("searched", "others", "message"),
    [
        (
            {"train.lr": [0.1, -1]},
            {},
            "space.train.lr: the value -1 is not accepted: train.lr: Input should be",
        ),
        ({"train.lr": {"uniform": [0, 1]}}, {}, "train.lr: Input should be greater than 0 (given: 0)"),
        ({"train.batch_size": {"uniform": [8, 16]}}, {}, "space.train.batch_size: the value 10.9"),
        ({"adapter.cell": ["gated", "lstm"]}, {}, "space.adapter.cell: the value 'lstm' is not accepted"),
        (
            {"engine.zero_stage": [0, 3], "engine.compile": [False, True]},
            {},
            "engine.zero_stage 3, engine.compile True are not accepted together: engine: engine.compile needs",
        ),
        ({"train.lr": [0.1]}, {"settings": {"train.steps": -4}}, "train.steps: Input should be"),
        ({"train.lr": [0.1]}, {"recipe": "none"}, "no recipe 'none'"),
        (
            {
                "adapter.cell": {"choice": ["gated"], "when": {"adapter.method": "gpc"}},
                "adapter.method": {"choice": ["gpc"], "when": {"adapter.cell": "gated"}},
            },
            {},
            "conditions form a circle: adapter.",
        ),
        (
            {"train.lr": {"choice": [0.1], "when": {"train.lr": 0.1}}},
            {},
            "conditions form a circle: train.lr -> train.lr",
        ),
        (
            {
                "adapter.method": ["gpc"],
                "adapter.cell": {"choice": ["gated"], "when": {"adapter.method": "gcp"}},
            },
            {},
            "space.adapter.cell: when: adapter.method never is 'gcp': its values are 'gpc'",
        ),
        (
            {
                "train.lr": {"uniform": [0.1, 1]},
                "adapter.cell": {"choice": ["gated"], "when": {"train.lr": 1}},
            },
            {},
            "train.lr is drawn from a range",
        ),
        (
            {"train.lr": {"uniform": [0.1, 1]}},
            {"algorithm": "grid"},
            "space.train.lr: algorithm grid needs a list of values, not uniform",
        ),
        ({"train.lr": {"grid": [0.1, 1]}}, {"algorithm": "optuna"}, "space.train.lr: algorithm optuna draws"),
        (
            {"adapter.cell": {"grid": ["gated"], "when": {"adapter.method": "gpc"}}},
            {},
            "a grid with a condition needs algorithm grid",
        ),
        (
            {"train.batch_size": [8, 16]},
            {"scheduler": {"name": "pbt", "perturb_every": 5}},
            "'pbt' changes keys of train. while trials run, and the space has none",
        ),
        (
            {"adapter.method": ["gpc", "fine-tuning"]},
            {"resources": {"pack": 2}, "settings": {"engine.zero_stage": 0}},
            "give --resources.pack 1",
        ),
    ],
)
def test_what_would_fail_later_is_refused(
    searched: dict[str, Any], others: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        space.validate(make(searched, **others))
    assert message in str(error.value)


def test_a_key_that_needs_another_is_tried_with_it() -> None:
    text = {"choice": ["is it done?"], "when": {"adapter.prompt_init": "text"}}
    space.validate(make({"adapter.prompt_init": ["vocab", "text"], "adapter.prompt_text": text}))
    with pytest.raises(UserError, match=r"the value 'text' is not accepted.* needs adapter\.prompt_text"):
        space.validate(make({"adapter.prompt_init": ["vocab", "text"]}))
    number = {"choice": ["is it done?", 7], "when": {"adapter.prompt_init": "text"}}
    with pytest.raises(UserError, match=r"space\.adapter\.prompt_text: the value 7 is not accepted"):
        space.validate(make({"adapter.prompt_init": ["vocab", "text"], "adapter.prompt_text": number}))
    space.validate(
        make({"adapter.prompt_text": ["a", "b"]}, settings={"adapter.prompt_init": "text"}),
    )


def test_a_searched_number_of_steps_takes_the_place_of_the_recipes_epochs() -> None:
    spec = make({"train.steps": [5, 10]}, recipe="rte")
    space.validate(spec)
    built = space.trial_config(spec, {"train.steps": 5}, {"run.seed": 3, "run.name": "t0"})
    assert (built.train.steps, built.train.epochs, built.run.seed, built.run.name) == (5, None, 3, "t0")


def test_lanes_of_a_pack_may_differ_in_the_adapter_and_the_training() -> None:
    searched = {
        "train.lr": [0.1],
        "adapter.cell": ["gated", "residual"],
        "adapter.method": ["gpc", "prompt-tuning"],
    }
    space.validate(make(searched, resources={"pack": 2}))


@pytest.mark.parametrize(
    ("key", "value", "shared"),
    [
        ("train.lr", "0.5", True),
        ("data.limit_train", "10", True),
        ("adapter.method", "prompt-tuning", True),
        ("adapter.method", "linear-probe", True),  # its head reads cached states
        ("adapter.prompt_tokens", "11", False),
        ("encoder.path", "other", False),
        ("task.label", "other", True),
        ("data.train", "other.jsonl", True),
        ("data.max_length", "16", True),
        ("engine.dtype", "bf16", False),
    ],
)
def test_a_pack_shares_encoder_and_engine(key: str, value: str, shared: bool) -> None:
    one, other = pack_key(config.load("demo")), pack_key(config.load("demo", {key: value}))
    assert (one.joined(other) is not None) is shared
    assert one.joined(other) == other.joined(one)


def test_a_linear_probe_that_computes_its_states_in_every_pass_has_a_pack_of_its_own() -> None:
    uncached = {"engine.state_cache": "none"}
    prompt = pack_key(config.load("demo", uncached))
    probe = pack_key(config.load("demo", uncached | {"adapter.method": "linear-probe"}))
    assert prompt.joined(probe) is None
    assert probe.joined(probe) == probe


def test_probes_share_a_pack_with_prompts_of_one_kind() -> None:
    probe, short, long = (
        pack_key(config.load("demo", given))
        for given in ({"adapter.method": "linear-probe"}, {}, {"adapter.prompt_tokens": "11"})
    )
    both = probe.joined(short)
    assert both is not None
    assert both.joined(probe) == both
    assert both.joined(short) == both
    assert both.joined(long) is None
    assert both.alone("x").joined(both) is None


def test_the_goal_is_the_tasks_own_metric_when_not_given() -> None:
    searched = {"train.lr": [0.1]}
    assert space.goal(make(searched)) == ("accuracy", "max")
    assert space.goal(make(searched, recipe="cb")) == ("average", "max")
    assert space.goal(make(searched, recipe="cb", metric="f1_macro", mode="min")) == ("f1_macro", "min")
    regression = {"task.kind": "regression", "task.labels": None}
    assert space.goal(make(searched, settings=regression, metric="rmse")) == ("rmse", "min")
    with pytest.raises(UserError, match="no metric 'f1'"):
        space.goal(make(searched, metric="f1"))


def test_population_based_training_changes_what_a_run_can_change_on_its_way() -> None:
    from ray.tune.schedulers import PopulationBasedTraining

    searched = EVERY_KIND | {
        "adapter.method": ["gpc", "prompt-tuning"],
        "train.cell_lr": {"loguniform": [1e-4, 1e-3], "when": {"adapter.method": "gpc"}},
    }
    spec = make(searched, scheduler={"name": "pbt", "perturb_every": 5})
    space.validate(spec)
    changed = space.mutations(spec)
    assert set(changed) == {"train.lr", "train.weight_decay", "train.betas", "train.clip_norm"}
    scheduler = PopulationBasedTraining(
        hyperparam_mutations=changed,
        custom_explore_fn=lambda sample: space.within(spec, sample),
        metric="m",
        mode="max",
    )
    random.seed(0)
    np.random.seed(0)
    sample = first = from_ray(spec)[0]
    decays = []
    for _ in range(50):
        sample, _ = scheduler._get_new_config(None, type("Trial", (), {"config": sample})())
        decays.append(sample["train.weight_decay"])
        assert 1e-3 <= sample["train.lr"] <= 1e-1
        assert {key: sample[key] for key in sample if key not in changed} == {
            key: first[key] for key in first if key not in changed
        }
        space.trial_config(spec, sample)
    assert all(0 <= decay <= 0.1 for decay in decays)
    assert 0.1 in decays  # a step led out of the range


PBT: dict[str, Any] = {"scheduler": {"name": "pbt", "perturb_every": 4}}


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_what_was_drawn_is_taken_for_drawn(algorithm: str) -> None:
    spec = make(EVERY_KIND | CHAIN, algorithm=algorithm)
    drawn = draw(spec, 40)
    recorded = {str(number): space.settings_of(each) for number, each in enumerate(drawn)}
    assert len({len(each) for each in recorded.values()}) > 1
    space.check_recorded(spec, json.loads(json.dumps(recorded)))


@pytest.mark.parametrize(
    ("changed", "others", "said"),
    [
        ({"train.lr": 0.5}, {}, "train.lr 0.5 is not in the space of the search"),
        ({"train.lr": None}, {}, "train.lr None is not in the space of the search"),
        ({"train.lr": "0.01"}, PBT, "train.lr '0.01' is not in the space of the search"),
        ({"train.lr": float("nan")}, PBT, "train.lr nan is not in the space of the search"),
        ({"adapter.cell": "mine"}, {}, "adapter.cell 'mine' is not in the space of the search"),
        ({"train.steps": 7}, {}, "the space of the search has no train.steps"),
        ({"train.lr": 0.5}, PBT, ""),
    ],
)
def test_what_cannot_have_been_drawn_is_refused(
    changed: dict[str, Any], others: dict[str, Any], said: str
) -> None:
    spec = make({"train.lr": {"loguniform": [1e-3, 1e-1]}, "adapter.cell": ["residual", "gated"]}, **others)
    settings = {"train.lr": 1e-3, "adapter.cell": "gated"}
    space.check_recorded(spec, {"a": settings})
    if not said:
        space.check_recorded(spec, {"a": settings | changed})
        return
    with pytest.raises(UserError) as caught:
        space.check_recorded(spec, {"a": settings, "b": settings | changed})
    assert str(caught.value) == f"b: {said}: restore or remove it"


def test_a_recorded_key_that_is_missing_is_refused() -> None:
    spec = make({"train.lr": {"loguniform": [1e-3, 1e-1]}, "adapter.cell": ["residual", "gated"]})
    with pytest.raises(UserError, match="^a: train.lr is missing: restore or remove it"):
        space.check_recorded(spec, {"a": {"adapter.cell": "gated"}})


def test_recorded_settings_are_those_of_a_configuration() -> None:
    listed = [{"train.lr": 0.1}, {"train.lr": 0.2, "train.betas": [0.8, 0.9]}]
    spec = SearchSpec.model_validate({"recipe": "demo", "configurations": listed})
    space.check_recorded(spec, {"a": listed[0], "b": listed[1]})
    with pytest.raises(
        UserError, match="^b: settings are in no configuration of the search: restore or remove"
    ):
        space.check_recorded(spec, {"a": listed[0], "b": {"train.lr": 0.2}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheduler": {"name": "median"}}, "scheduler.name 'median' compares trials while they run"),
        ({"algorithm": "optuna"}, "algorithm 'optuna' compares trials while they run"),
        ({"stop": {"patience": 2}}, "stop.patience compares trials while they run"),
    ],
)
def test_trials_of_different_tasks_are_not_compared(given: dict[str, Any], message: str) -> None:
    tree = {"recipe": "rte", "space": {"task.name": ["rte", "wic"]}, "trials": 2}
    space.validate(SearchSpec.model_validate(tree))
    with pytest.raises(UserError, match=message):
        space.validate(SearchSpec.model_validate(tree | given))


@pytest.mark.parametrize(
    "given",
    [{"space": {"task.name": ["rte", "cola"]}, "trials": 2}, {"configurations": [{}, {"task.name": "cola"}]}],
)
def test_a_search_has_one_metric(given: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match="task rte are measured by accuracy, and those of cola by matthews: a search"
    ):
        space.goal(SearchSpec.model_validate({"recipe": "rte", **given}))
