"""The specification of a search: packaged ones, overrides and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpc_dist import schema
from gpc_dist.errors import UserError
from gpc_dist.search import space, spec
from gpc_dist.search.pack_key import pack_key
from gpc_dist.shipped import SHIPPED, shipped_folder

SEARCHES = schema.yaml_names(shipped_folder("tune"))
LEAST = "recipe: rte\nspace: {train.lr: [0.1, 0.2]}\n"


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", SEARCHES)
def test_every_packaged_search_is_valid_and_says_how_to_run_it(name: str) -> None:
    loaded = spec.load(name)
    space.validate(loaded)
    assert loaded.folder == Path("searches") / name
    text = (shipped_folder("tune") / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert f"#   gpc-dist tune {name}\n" in text


def test_the_promised_searches_are_there() -> None:
    assert {"cb-asha", "rte-asha", "demo", "demo-grid", "t5-xl-pbt"} <= set(SEARCHES)
    assert "tune" in SHIPPED


def test_every_key_is_documented() -> None:
    fields = schema.all_keys(spec.SearchSpec)
    assert [key for key, field in fields.items() if not field.description] == []


@pytest.mark.parametrize("name", SEARCHES)
def test_the_written_search_is_the_same_search(tmp_path: Path, name: str) -> None:
    loaded = spec.load(name)
    assert spec.load(write(tmp_path, loaded.to_yaml())) == loaded


def test_overrides_come_after_the_file() -> None:
    loaded = spec.load(
        "cb-asha", {"trials": "8", "scheduler.name": "fifo", "seeds": "[1, 2]", "tracking.experiment": "x"}
    )
    assert (loaded.trials, loaded.scheduler.name, loaded.seeds) == (8, "fifo", [1, 2])
    assert loaded.scheduler.reduction_factor == 2
    assert loaded.tracking.experiment == "x"


def test_text_is_taken_as_it_is_written() -> None:
    given = {
        "name": "001",
        "dir": "2024 #1",
        "metric": "yes",
        "register_as": "null",
        "tracking.group": "a: b",
        "settings.adapter.prompt_text": "Is ticket #12 urgent?",
        "space.task.label": "[label, '2024']",
    }
    loaded = spec.load("cb-asha", given)
    assert (loaded.name, loaded.dir, loaded.metric, loaded.register_as) == (
        "001",
        Path("2024 #1"),
        "yes",
        None,
    )
    assert loaded.tracking.group == "a: b"
    assert loaded.settings["adapter.prompt_text"] == "Is ticket #12 urgent?"
    assert loaded.space["task.label"].values == ("label", "2024")


def test_a_value_that_yaml_reads_otherwise_is_answered_with_the_remedy() -> None:
    with pytest.raises(UserError, match=r"task\.label: .*: put quotes around text"):
        space.validate(spec.load("cb-asha", {"space.task.label": "[yes, label]"}))


def test_settings_given_on_the_command_line_take_the_place_of_the_files() -> None:
    loaded = spec.load("cb-asha", {"settings.train.steps": "100", "settings.adapter.cell": "gated"})
    assert loaded.settings == {"train.steps": 100, "adapter.cell": "gated"}
    assert "adapter.cell" not in loaded.space
    assert space.base_config(loaded).train.epochs is None


def test_a_fixed_key_can_be_searched_and_a_searched_one_left_out() -> None:
    loaded = spec.load("cb-asha", {"space.train.epochs": "[10, 20]", "space.train.cell_lr": "null"})
    assert loaded.settings == {}
    assert loaded.space["train.epochs"].values == (10, 20)
    assert "train.cell_lr" not in loaded.space


def test_configurations_are_tried_as_they_stand(tmp_path: Path) -> None:
    from gpc_dist.search.algorithm import draw

    text = """
recipe: demo
configurations: [{adapter.first_layer: 2}, {train.lr: 0.1, adapter.cell_layers: [0, 2]}, {}]
resources: {pack: 2}
"""
    loaded = spec.load(write(tmp_path, text))
    assert spec.load(write(tmp_path, loaded.to_yaml())) == loaded
    space.validate(loaded)
    drawn = draw(loaded)
    assert [space.settings_of(each) for each in drawn] == loaded.configurations
    assert {tuple(each) for each in drawn} == {("adapter.first_layer", "train.lr", "adapter.cell_layers")}
    assert space.count(loaded) == 3
    assert space.base_config(loaded).adapter.first_layer == 2
    # which a space may not do in one pack
    assert len({pack_key(space.trial_config(loaded, each)) for each in draw(loaded)}) == 2


@pytest.mark.parametrize(
    ("configurations", "message"),
    [
        (
            "[{}, {train.lr: -1}]",
            "configurations: number 2 is not accepted: train.lr: Input should be greater",
        ),
        ("[{adapter.method: fine-tuning}]", "give --resources.pack 1"),
    ],
)
def test_a_configuration_that_would_fail_is_refused(
    tmp_path: Path, configurations: str, message: str
) -> None:
    text = f"recipe: demo\nsettings: {{engine.zero_stage: 0}}\nconfigurations: {configurations}\nresources: {{pack: 2}}"
    with pytest.raises(UserError) as error:
        space.validate(spec.load(write(tmp_path, text)))
    assert message in str(error.value)


def test_the_name_is_the_files_when_not_given(tmp_path: Path) -> None:
    assert spec.load(write(tmp_path, LEAST + "trials: 1")).folder == Path("searches/mine")
    assert spec.load(write(tmp_path, LEAST + "trials: 1\ndir: here")).folder == Path("here")


def test_a_recipe_is_found_beside_the_search(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "r.yaml").write_text("run: {name: beside}\n")
    text = "recipe: recipes/r.yaml\nspace: {train.lr: [0.1]}\ntrials: 1\n"
    assert space.base_config(spec.load(write(tmp_path, text))).run.name == "beside"


def test_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    text = (
        "recipe: rte\ntrials: 1\nspace: {train.lr: {loguniform: [1e-4, 1e-2]}, train.cell_lr: [1e-3, 2E+0]}"
    )
    loaded = spec.load(write(tmp_path, text))
    assert loaded.space["train.lr"].values == (1e-4, 1e-2)
    assert loaded.space["train.cell_lr"].values == (1e-3, 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trials: 1\ntrials: 2", "duplicate key 'trials'"),
        ("- 1", "a search is a mapping of: name, dir, recipe"),
        ("trails: 3", "unknown key 'trails'; did you mean 'trials'? Valid keys: name, dir, recipe, settings"),
        (LEAST + "trials: 1\nscheduler: asha", "scheduler is a mapping of keys to values (given: 'asha')"),
        (LEAST + "trials: 1\nscheduler: {grace_step: 3}", "did you mean 'scheduler.grace_steps'?"),
        (LEAST + "trials: 1\nscheduler: {name: hyperband}", "scheduler.name: Input should be 'fifo'"),
        (LEAST + "trials: 1\nscheduler: {name: pbt}", "'pbt' needs scheduler.perturb_every"),
        (
            LEAST + "trials: 1\nscheduler: {name: pbt, perturb_every: 5}\nalgorithm: optuna",
            "needs algorithm random or grid",
        ),
        (LEAST + "trials: 1\nresources: {ranks: 2, gpus_per_rank: 0.5}", "needs resources.ranks 1"),
        (LEAST + "trials: 1\nseeds: [1, 1]", "seeds: give different seeds"),
        (LEAST, "algorithm 'random' needs trials"),
        (LEAST + "trials: 4\nalgorithm: grid", "leave out trials, or give --trials null"),
        ("space: {train.lr: [1]}\ntrials: 1", "recipe: Field required"),
        (
            "recipe: rte\ntrials: 1",
            "space is empty: give at least one key and its values, or give configurations",
        ),
        ("recipe: rte\nconfigurations: []", "configurations: List should have at least 1 item"),
        (
            "recipe: rte\nconfigurations: [{train.lrr: 1}]",
            "configurations: unknown key 'train.lrr'; did you mean",
        ),
        (
            "recipe: rte\nconfigurations: [{run.seed: 1}]",
            "'run.seed' is set by the search itself: give `seeds`",
        ),
        ("recipe: rte\nconfigurations: [{train.lr: 1}, {}, {train.lr: 1}]", "number 3 stands there before"),
        (
            "recipe: rte\nsettings: {train.lr: 1}\nconfigurations: [{train.lr: 2}]",
            "train.lr: both in settings and in configurations",
        ),
        (LEAST + "configurations: [{train.lr: 2}]", "leave out space, trials and algorithm"),
        ("recipe: rte\ntrials: 1\nconfigurations: [{train.lr: 2}]", "leave out space, trials and algorithm"),
        (
            "recipe: rte\nscheduler: {name: pbt, perturb_every: 5}\nconfigurations: [{train.lr: 2}]",
            "give space, not configurations",
        ),
        ("recipe: rte\ntrials: 1\nspace: {}", "space is empty"),
        (LEAST + "trials: 1\nsettings: {train.lr: 0.1}", "train.lr: both in settings and in space"),
        (LEAST + "trials: 1\nsettings: {train.lrr: 0.1}", "settings: unknown key 'train.lrr'; did you mean"),
        (
            LEAST + "trials: 1\nsettings: {run.seed: 1}",
            "'run.seed' is set by the search itself: give `seeds`",
        ),
        (LEAST + "trials: 1\nsettings: {tracking.uri: x}", "give the search's own `tracking` section"),
        (
            "recipe: rte\ntrials: 1\nspace: {train.learning_rate: [1]}",
            "Valid keys: train.steps, train.epochs",
        ),
        ("recipe: rte\ntrials: 1\nspace: {engine.ranks: [1, 2]}", "give `resources.ranks`"),
        (
            "recipe: rte\ntrials: 1\nspace: {train.lr: {choice: [1], when: {adapter.kind: gpc}}}",
            "space: train.lr: when: unknown key 'adapter.kind'",
        ),
        ("recipe: rte\ntrials: 1\nspace: {train.lr: 0.1}", "space.train.lr: one value is not searched"),
        ("recipe: rte\ntrials: 1\nspace: {train.lr: {normal: [0, 1]}}", "space.train.lr: give one of [1, 2]"),
        (
            "recipe: rte\ntrials: 1\nspace: {train.lr: {choice: [1], grid: [2]}}",
            "space.train.lr: give one of",
        ),
        ("recipe: rte\ntrials: 1\nspace: {train.lr: {choice: 1}}", "choice needs a list (given: 1)"),
        ("recipe: rte\ntrials: 1\nspace: {train.lr: {choice: [1], when: gpc}}", "when is a mapping"),
        ("recipe: rte\ntrials: 1\nspace: {train.lr: []}", "choice needs at least one value"),
        ("recipe: rte\ntrials: 1\nspace: {train.lr: [1, 1]}", "choice has a value twice"),
        ("recipe: rte\ntrials: 1\nspace: {train.lr: {uniform: [2, 1]}}", "two numbers, the lower one first"),
        ("recipe: rte\ntrials: 1\nspace: {train.lr: {uniform: [1, 2, 3]}}", "uniform needs two numbers"),
        ("recipe: rte\ntrials: 1\nspace: {train.lr: {uniform: [a, b]}}", "(given: ['a', 'b'])"),
        ("recipe: rte\ntrials: 1\nspace: {train.lr: {int: [1, 2.5]}}", "int needs two whole numbers"),
        (
            "recipe: rte\ntrials: 1\nspace: {train.lr: {loguniform: [0, 1]}}",
            "loguniform needs numbers above 0",
        ),
    ],
)
def test_a_bad_search_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        spec.load(write(tmp_path, text))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"trails": "8"}, "unknown key 'trails'; did you mean 'trials'?"),
        (
            {"scheduler.nam": "fifo"},
            "did you mean 'scheduler.name'? Valid keys: scheduler.name, scheduler.grace",
        ),
        (
            {"settings.train.stesp": "8"},
            "did you mean 'settings.train.steps'? Valid keys: settings.train.steps, settings.train.epochs",
        ),
        (
            {"train.steps": "8"},
            "'train.steps' is a key of the recipe: fix it with --settings.train.steps, or search",
        ),
        ({"run.seed": "8"}, "'run.seed' is set by the search itself: give `seeds`"),
        ({"settings.run.seed": "8"}, "settings: 'run.seed' is set by the search itself: give `seeds`"),
        ({"trials": "many"}, "trials: Input should be a valid integer"),
        ({"space.train.lr": "{uniform: [1"}, "--space.train.lr is not valid YAML"),
    ],
)
def test_a_bad_override_is_refused(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as error:
        spec.load("demo", overrides)
    assert message in str(error.value)


def test_an_unknown_search_is_answered_with_the_packaged_ones() -> None:
    with pytest.raises(UserError, match="no search 'cb': give a YAML file or one of cb-asha, demo"):
        spec.load("cb")
    with pytest.raises(UserError, match="search file none.yaml does not exist"):
        spec.load("none.yaml")


def test_adapters_to_start_from_stand_relative_to_the_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    written = (
        "recipe: rte\ntrials: 4\nsettings: {train.lr: 0.1}\nspace:\n"
        "  adapter.init_from: [null, one, two, runs/three]\n"
        "  train.head_lr: {choice: [0.1, 0.2], when: {adapter.init_from: [one, two]}}\n"
    )
    loaded = spec.load(write(tmp_path, written))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert loaded.space["adapter.init_from"].values == (None, one, two, "runs/three")
    assert loaded.space["train.head_lr"].when == {"adapter.init_from": (one, two)}
    space.validate(loaded)
    listed = spec.load(
        write(tmp_path, "recipe: rte\nconfigurations: [{adapter.init_from: one}, {train.lr: 1}]\n")
    )
    assert listed.configurations == [{"adapter.init_from": one}, {"train.lr": 1}]


def test_trials_that_start_from_different_adapters_share_a_pack() -> None:
    loaded = spec.load("cb-asha")
    starts = [space.trial_config(loaded, {"adapter.init_from": start}) for start in (None, "one", "two")]
    assert len({pack_key(start) for start in starts}) == 1
