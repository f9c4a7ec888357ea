"""The specification of a study: packaged ones, overrides, refusals, and the searches that are made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpc_dist import schema
from gpc_dist.errors import UserError
from gpc_dist.runs.folder import SearchFolder
from gpc_dist.search import space
from gpc_dist.shipped import shipped_folder
from gpc_dist.study import spec
from gpc_dist.study.searches import draw, searches

STUDIES = schema.yaml_names(shipped_folder("tune") / "studies")
LEAST = """
tasks: {rte: {}}
methods:
  prompt-tuning: {space: {train.lr: {loguniform: [1e-3, 1e-1]}}}
  gpc: {space: {train.lr: {loguniform: [1e-3, 1e-1]}, train.cell_lr: {loguniform: [1e-4, 1e-3]}}}
"""


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_every_packaged_study_is_valid_and_says_how_to_run_it(name: str) -> None:
    loaded = spec.load(name)
    assert loaded.folder == Path("studies").absolute() / name
    text = (shipped_folder("tune") / "studies" / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert f"#   gpc-dist study {name} " in text
    assert loaded.reference in loaded.methods
    for task in loaded.tasks:
        drawn = draw(loaded, task)
        assert drawn.keys() == loaded.methods.keys()
        assert all(1 <= len(group) <= loaded.trials for group in drawn.values())
        tried = [each for group in drawn.values() for each in group]
        made = searches(loaded, task, "search", tried)
        assert sum(len(search.configurations or []) for search in made) == len(tried)
        for search in made:
            space.validate(search)
            assert space.base_config(search).data.holdout


def test_the_promised_studies_are_there() -> None:
    assert {"minilm", "five-tasks", "minilm-full", "roberta-large", "t5-v1_1-xl", "ablations", "late"} <= set(
        STUDIES
    )


def test_every_key_is_documented() -> None:
    for tree in (spec.StudySpec, spec.TaskSpec, spec.MethodSpec):
        fields = schema.all_keys(tree)
        missing = [key for key, field in fields.items() if not field.description]
        assert missing == []


@pytest.mark.parametrize("name", STUDIES)
def test_the_written_study_is_the_same_study(tmp_path: Path, name: str) -> None:
    loaded = spec.load(name)
    assert spec.load(write(tmp_path, loaded.to_yaml())) == loaded


def test_overrides_come_after_the_file(tmp_path: Path) -> None:
    loaded = spec.load(
        "minilm",
        {
            "trials": "2",
            "encoder.path": "roberta-base",
            "settings.train.steps": "7",
            "tasks.cb": "null",
            "tasks.sst2.settings.train.epochs": "1",
            "tasks.rte.data": "RTE",
            "methods.deep-prompt": "null",
            "methods.gpc.settings.adapter.cell": "gated",
            "data_root": str(tmp_path),
            "resources.pack": "3",
        },
    )
    assert (loaded.trials, loaded.resources.pack, list(loaded.tasks)) == (
        2,
        3,
        ["cola", "sst2", "boolq", "rte"],
    )
    assert "deep-prompt" not in loaded.methods
    found = loaded.settings_of("rte", "gpc")
    assert (found["encoder.path"], found["data.path"]) == ("roberta-base", str(tmp_path / "RTE"))
    assert (found["train.steps"], found["adapter.cell"], found["adapter.method"]) == (7, "gated", "gpc")
    # of two keys that exclude each other the more particular one holds
    assert "train.steps" not in loaded.settings_of("sst2", "gpc")


def test_text_is_taken_as_it_is_written(tmp_path: Path) -> None:
    given = {
        "name": "001",
        "data_root": "2024",
        "encoder.path": "models #2",
        "settings.adapter.prompt_text": "Is ticket #12 urgent?",
        "tasks.rte.data": "no",
        "tasks.rte.settings.task.label": "yes",
        "methods.gpc.settings.encoder.revision": "1e3",
        "methods.gpc.space.train.lr": "[0.1, 0.2]",
    }
    loaded = spec.load(write(tmp_path, LEAST), given)
    assert (loaded.name, loaded.encoder.path) == ("001", "models #2")
    found = loaded.settings_of("rte", "gpc")
    assert (found["data.path"], found["task.label"], found["encoder.revision"]) == ("2024/no", "yes", "1e3")
    assert found["adapter.prompt_text"] == "Is ticket #12 urgent?"
    assert loaded.methods["gpc"].space["train.lr"].values == (0.1, 0.2)


def test_a_section_may_be_left_empty(tmp_path: Path) -> None:
    loaded = spec.load(write(tmp_path, LEAST + "  linear-probe:\nsettings:\ntracking:\nresources:"))
    assert (loaded.settings, loaded.tracking.experiment, loaded.methods["linear-probe"].space) == (
        {},
        "mine",
        {},
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "a study is a mapping of: name, dir, encoder"),
        ("trails: 3\n" + LEAST, "unknown key 'trails'; did you mean 'trials'?"),
        ("tasks: {}\nmethods: {gpc: {}}", "tasks: Dictionary should have at least 1 item"),
        ("tasks: [rte]\nmethods: {gpc: {}}", "tasks is a mapping of names"),
        (
            "tasks: {rte: data}\nmethods: {gpc: {}}",
            "tasks.rte is a mapping of keys to values (given: 'data')",
        ),
        ("tracking: 3\n" + LEAST, "tracking is a mapping of keys to values (given: 3)"),
        (LEAST + "seeds: [1, 2]", "seeds: List should have at least 3 items"),
        (LEAST + "seeds: [0, 1, 2]", "seeds: 0 also in search_seeds"),
        (LEAST + "seeds: [1, 1, 2]", "give different seeds"),
        ("tasks: {rte: {}}\nmethods: {mine: {}}", "'mine' is no method of its own"),
        ("tasks: {a/b: {}}\nmethods: {gpc: {}}", "'a/b' becomes the name of a folder"),
        ("tasks: {rte: {settings: {train.lrr: 1}}}\nmethods: {gpc: {}}", "unknown key 'train.lrr'"),
        (
            "tasks: {rte: {}}\nmethods: {gpc: {settings: {run.seed: 1}}}",
            "'run.seed' is set by the search itself",
        ),
        (
            "tasks: {rte: {}}\nmethods: {gpc: {settings: {train.lr: 1}, space: {train.lr: [1, 2]}}}",
            "train.lr: both in settings and in space",
        ),
        (
            "tasks: {rte: {}}\nmethods: {gpc: {space: {adapter.method: [gpc]}}}",
            "give each a method of its own",
        ),
        (
            LEAST + "choices: {rte: {gpc: {train.lr: 0.1}}}",
            "choices.rte.gpc has train.lr, but the method searches train.lr, train.cell_lr: give these",
        ),
        (
            LEAST + "  linear-probe: {}\nchoices: {rte: {linear-probe: {train.lr: 0.1}}}",
            "choices.rte.linear-probe has train.lr, but the method searches nothing",
        ),
        (LEAST + "holdout: 1.5", "holdout: Input should be less than 1"),
    ],
)
def test_a_bad_study_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        spec.load(write(tmp_path, text))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("trails", "unknown key 'trails'; did you mean 'trials'?"),
        ("tasks.rte.dat", "unknown key 'tasks.rte.dat': give tasks.rte.recipe, tasks.rte.data"),
        ("methods.gpc", "or methods.gpc null to leave it out"),
        ("encoder.paths", "did you mean 'encoder.path'?"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, key: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        spec.load(write(tmp_path, LEAST), {key: "1"})
    assert message in str(error.value)


def test_an_unknown_study_is_refused() -> None:
    with pytest.raises(
        UserError,
        match="no study 'nothing': give a YAML file or one of ablations, demo, five-tasks, late, minilm",
    ):
        spec.load("nothing")


def test_all_methods_have_the_same_budget(tmp_path: Path) -> None:
    text = LEAST + "  deep-prompt: {space: {train.lr: {loguniform: [1e-3, 1e-1]}}}\ntrials: 5"
    drawn = draw(spec.load(write(tmp_path, text)), "rte")
    methods = ("prompt-tuning", "gpc", "deep-prompt")
    assert {method: [each["adapter.method"] for each in group] for method, group in drawn.items()} == {
        method: [method] * 5 for method in methods
    }
    rates = {method: [each["train.lr"] for each in group] for method, group in drawn.items()}
    assert len(set(rates["gpc"])) == 5
    # with the same space the same draws
    assert rates["deep-prompt"] == rates["prompt-tuning"]


def test_a_searched_key_takes_the_place_of_what_it_excludes(tmp_path: Path) -> None:
    text = "tasks: {rte: {}}\nmethods: {gpc: {space: {train.epochs: [1, 2]}}}\nsettings: {train.steps: 9}"
    loaded = spec.load(write(tmp_path, text))
    assert loaded.settings_of("rte", "gpc")["train.steps"] == 9
    drawn = draw(loaded, "rte")["gpc"]
    assert {each["train.epochs"] for each in drawn} == {1, 2}
    assert not any("train.steps" in each for each in drawn)


def test_what_an_earlier_study_chose_is_not_searched_again(tmp_path: Path) -> None:
    text = LEAST + "settings: {train.steps: 9}\ntrials: 3"
    earlier = spec.load(write(tmp_path, text))
    rates = {"train.lr": 0.02, "train.cell_lr": 4e-4}
    chosen = {
        "prompt-tuning": {
            "configuration": {"train.lr": 0.03, "train.steps": 50, "adapter.method": "prompt-tuning"}
        },
        "gpc": {"configuration": rates},
        "gone": {"configuration": rates},
        "failed": {"configuration": None},
        "unsearched": {"configuration": rates},
    }
    methods = earlier.model_dump(mode="json")["methods"]
    methods |= {"gone": methods["gpc"], "failed": methods["gpc"], "unsearched": {"settings": {}, "space": {}}}
    report = {"study": {"methods": methods}, "tasks": {"rte": {"methods": chosen}, "cb": {"methods": {}}}}
    (tmp_path / "report.json").write_text(json.dumps(report))

    loaded = spec.load(
        write(tmp_path, text.replace("{rte: {}}", "{rte: {}, cola: {}}") + "\nchoices: report.json")
    )
    drawn = draw(loaded, "rte")
    assert [(each["train.lr"], each["train.steps"]) for each in drawn["prompt-tuning"]] == [(0.03, 9)]
    assert [{key: each[key] for key in rates} for each in drawn["gpc"]] == [rates]
    assert all(len(group) == 3 for group in draw(loaded, "cola").values())
    # a begun study needs the report no more
    (tmp_path / "report.json").unlink()
    assert spec.load(write(tmp_path, loaded.to_yaml())) == loaded


def test_choices_that_are_no_report_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"study": {"methods": []}}')
    for given in (tmp_path / "other.json", tmp_path / "nowhere.json"):
        with pytest.raises(
            UserError, match=f"{given.name} is no report.json of a study: give the path of one"
        ):
            spec.load(write(tmp_path, LEAST), {"choices": str(given)})


def test_two_methods_that_are_the_same_are_refused(tmp_path: Path) -> None:
    text = "tasks: {rte: {}}\nmethods: {gpc: {}, mine: {settings: {adapter.method: gpc}}}"
    with pytest.raises(UserError, match="methods gpc and mine try the same configuration on rte"):
        draw(spec.load(write(tmp_path, text)), "rte")


def test_a_grid_counts_in_the_budget(tmp_path: Path) -> None:
    text = "tasks: {rte: {}}\ntrials: 6\nmethods: {gpc: {space: {train.lr: {loguniform: [1e-3, 1e-1]}, KEY}}}"
    pooled = draw(
        spec.load(write(tmp_path, text.replace("KEY", "adapter.pooling: {grid: [mean, prompt]}"))), "rte"
    )
    assert sorted(each["adapter.pooling"] for each in pooled["gpc"]) == ["mean"] * 3 + ["prompt"] * 3
    big = spec.load(write(tmp_path, text.replace("KEY", "train.steps: {grid: [1, 2, 3, 4, 5, 6, 7]}")))
    with pytest.raises(UserError, match=r"methods\.gpc: its grid has 7 configurations, more than the 6 that"):
        draw(big, "rte")


def test_a_small_space_is_tried_once(tmp_path: Path) -> None:
    text = "tasks: {rte: {}}\nmethods: {gpc: {space: {adapter.cell: [gated, residual]}}, linear-probe: {}}\ntrials: 20"
    drawn = draw(spec.load(write(tmp_path, text)), "rte")
    assert (len(drawn["gpc"]), len(drawn["linear-probe"])) == (2, 1)


def test_what_trains_its_encoder_is_searched_by_itself(tmp_path: Path) -> None:
    text = LEAST + "  fine-tuning: {}\n  linear-probe: {}\n  long: {settings: {adapter.method: gpc, "
    text += "adapter.prompt_tokens: 50}}\ntrials: 2\nresources: {pack: 4}"
    loaded = spec.load(write(tmp_path, text))
    drawn = draw(loaded, "rte")
    mixed = [each for pair in zip(*(drawn["gpc"], drawn["prompt-tuning"]), strict=True) for each in pair]
    others = [*drawn["long"], *drawn["linear-probe"]]
    packed, alone = searches(loaded, "rte", "final", [mixed[0], *others, *mixed[1:], *drawn["fine-tuning"]])
    assert (packed.resources.pack, alone.resources.pack) == (4, 1)
    assert packed.seeds == alone.seeds == [1, 2, 3]
    assert alone.settings["adapter.method"] == "fine-tuning"
    # those that can share packs stand together, and a probe with any of them
    configurations = packed.configurations or []
    methods = [each["adapter.method"] for each in configurations]
    assert methods == ["gpc", "linear-probe", "prompt-tuning", "gpc", "prompt-tuning", "gpc"]
    assert [each.get("adapter.prompt_tokens") for each in configurations] == [None] * 5 + [50]
    assert packed.tracking.experiment == "mine"


def test_what_is_added_to_a_study_is_run_beside_what_has_begun(tmp_path: Path) -> None:
    text = LEAST + "  fine-tuning: {}\ntrials: 2"
    begun = spec.load(write(tmp_path, text), {"dir": str(tmp_path / "study")})
    drawn = draw(begun, "rte")
    for made in searches(begun, "rte", "final", [drawn["gpc"][0], *drawn["fine-tuning"]]):
        made.folder.mkdir(parents=True)
        SearchFolder(made.folder).config.write_text(made.to_yaml())

    more = begun.model_copy(update={"seeds": [1, 2, 3, 8]})
    wanted = [drawn["gpc"][0], drawn["prompt-tuning"][0], *drawn["fine-tuning"]]
    found = searches(more, "rte", "final", wanted)
    assert [(each.folder.name, each.seeds, len(each.configurations or [])) for each in found] == [
        ("final-packed", [1, 2, 3], 1),
        ("final-packed-2", [8], 1),
        ("final-packed-3", [1, 2, 3, 8], 1),
        ("final-alone", [1, 2, 3], 1),
        ("final-alone-2", [8], 1),
    ]
    assert [each.settings["adapter.method"] for each in found[1:3]] == ["gpc", "prompt-tuning"]
    # what has begun is taken as it was written, and is not run for a method that is left out
    assert [each.folder.name for each in searches(begun, "rte", "final", wanted[:1])] == ["final-packed"]


def test_adapters_to_start_from_stand_relative_to_the_study(tmp_path: Path) -> None:
    (tmp_path / "films").mkdir()
    methods = (
        "methods:\n  gpc: {}\n  from-films: {settings: {adapter.method: gpc, adapter.init_from: films}}\n"
    )
    loaded = spec.load(write(tmp_path, f"tasks: {{rte: {{}}}}\nreference: gpc\n{methods}"))
    assert loaded.settings_of("rte", "from-films")["adapter.init_from"] == str(tmp_path / "films")
