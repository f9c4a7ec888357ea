"""The configuration tree: recipes, overrides and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpc_dist import config, schema
from gpc_dist.errors import UserError
from gpc_dist.search import spec
from gpc_dist.study import spec as study
from gpc_dist.training.session import seed_everything


@pytest.mark.parametrize("name", config.recipe_names())
def test_every_recipe_loads_and_says_what_it_is_for(name: str) -> None:
    loaded = config.load(name)
    assert loaded.run.folder == Path("runs") / name
    text = (Path(config.__file__).parent / "recipes" / f"{name}.yaml").read_text()
    assert text.startswith("# ")


def test_the_promised_recipes_are_there() -> None:
    promised = "boolq cb cola copa multirc record rte sst2 wic wsc demo roberta-large t5-xl".split()
    assert set(promised) <= set(config.recipe_names())


def test_every_key_is_documented() -> None:
    assert [key for key, field in schema.all_keys(config.Config).items() if not field.description] == []


def test_overrides_come_after_the_recipe() -> None:
    loaded = config.load("rte", {"train.lr": "5e-3", "train.steps": "7", "task.text": "[a, b]"})
    assert (loaded.train.lr, loaded.train.steps, loaded.train.epochs) == (5e-3, 7, None)
    assert loaded.task.text == ["a", "b"]


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("adapter.prompt_text", "Is ticket #12 urgent?"),
        ("adapter.prompt_text", '"Urgent": yes, or [no]? * & ! % @ ` { \'  '),
        ("adapter.prompt_text", "- first\n- second"),
        ("data.path", "tickets #2"),
        ("data.path", "2024"),
        ("data.config", "1e3"),
        ("run.name", "001"),
        ("run.name", "null"),
        ("task.label", "yes"),
        ("task.name", "2024-13-45"),
        ("encoder.revision", "0x10"),
        ("tracking.group", "~"),
        ("encoder.revision", "1_000"),
    ],
)
def test_text_is_taken_as_it_is_written(key: str, text: str) -> None:
    section, _, name = key.partition(".")
    loaded = config.build({}, {key: text})
    assert getattr(getattr(loaded, section), name) == text
    assert config.build(schema.parse_yaml(loaded.to_yaml(), "what was written")) == loaded


def test_a_path_is_taken_as_it_is_written() -> None:
    assert config.build({}, {"run.dir": "001 #2"}).run.folder == Path("001 #2")


def test_a_text_that_may_be_left_out_is_left_out_by_null() -> None:
    loaded = config.build({"tracking": {"group": "a"}, "run": {"dir": "b"}}, {"tracking.group": "null"})
    assert loaded.tracking.group is None
    assert config.build({"run": {"dir": "b"}}, {"run.dir": "null"}).run.folder == Path("runs/run")


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("task.labels", "[yes, no]", "task.labels.0: Input should be a valid string: put quotes around text"),
        ("task.text", "[2024, text]", "task.text.0: Input should be a valid string: put quotes around text"),
        (
            "task.text",
            "[ticket #12]",
            "--task.text is not valid YAML: line 2, column 1: did not find expected ',' or ']'",
        ),
        (
            "task.labels",
            "[2024-13-45, x]",
            "--task.labels is not valid YAML: month must be in 1..12; put quotes",
        ),
        (
            "task.text",
            "title: {title}",
            """task.text: Input should be a valid list, such as '["first", "second"]'""",
        ),
    ],
)
def test_text_that_yaml_reads_otherwise_is_answered_with_the_remedy(
    key: str, text: str, message: str
) -> None:
    with pytest.raises(UserError) as error:
        config.build({}, {key: text})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("run.seed", ["-1", "4294967296", "1.5"]),
        ("data.max_length", ["7", "1000001"]),
        ("data.holdout", ["0", "1", "-0.1", ".nan"]),
        ("data.limit_train", ["0"]),
        ("data.limit_eval", ["0"]),
        ("adapter.prompt_tokens", ["0", "10001"]),
        ("adapter.cell_rank", ["0", "65537"]),
        ("adapter.cell_layers", ["[-1]"]),
        ("train.steps", ["0", "1000000001"]),
        ("train.epochs", ["0", "1.0e+300", ".inf", ".nan"]),
        ("train.batch_size", ["0", "1000001"]),
        ("train.batch_tokens", ["0", "1000000001"]),
        ("train.lr", ["0", "-1", ".inf", ".nan"]),
        ("train.cell_lr", ["0", ".inf"]),
        ("train.mlp_lr", ["0", ".inf"]),
        ("train.head_lr", ["0", ".inf"]),
        ("train.encoder_lr", ["0", ".inf"]),
        ("train.weight_decay", ["-1", ".inf"]),
        ("train.betas", ["[0.9, 1.0]", "[-0.1, 0.9]", "[0.9]", "[.nan, 0.9]"]),
        ("train.clip_norm", ["0", ".inf"]),
        ("train.warmup", ["-1", ".inf"]),
        ("train.eval_every", ["0"]),
        ("train.eval_batch_tokens", ["0"]),
        ("train.save_every", ["0"]),
        ("train.keep_last", ["0"]),
        ("train.log_every", ["0"]),
        ("train.patience", ["0"]),
        ("train.nonfinite_patience", ["0"]),
        ("engine.ranks", ["-3", "0", "1025", "1.5"]),
        ("engine.zero_stage", ["-1", "4"]),
        ("engine.micro_batch_tokens", ["0"]),
        ("engine.timeout_s", ["0", "1000000000000000"]),
        ("tracking.finish_timeout_s", ["-1", "1000000000000000"]),
    ],
)
def test_numbers_have_bounds(key: str, values: list[str]) -> None:
    for value in values:
        with pytest.raises(UserError, match=f"^{key}"):
            config.build({}, {key: value})


def test_no_number_is_without_a_bound() -> None:
    """One that is added needs a line above."""
    found = []
    for tree in (config.Config, spec.SearchSpec, study.StudySpec):
        for key, field in schema.all_keys(tree).items():
            numbers = {int, float, tuple[float, float]} & set(schema._kinds(field.annotation))
            bounded = field.metadata or key in (
                "engine.ranks",
                "engine.zero_stage",
                "official.zero_stage",
                "stop.threshold",
            )
            if numbers and not bounded:
                found.append(key)
    assert found == []


def test_the_largest_seed_can_be_used() -> None:
    seed_everything(config.build({}, {"run.seed": "4294967295"}).run.seed)
    with pytest.raises(ValueError, match="Seed must be between 0 and"):
        seed_everything(config.LARGEST_SEED + 1)


def test_the_dumped_tree_is_the_same_configuration() -> None:
    loaded = config.load("t5-xl")
    assert config.build(loaded.dump()) == loaded


def recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {lr: 1}\ntrain: {lr: 2}", "duplicate key 'train' in line 2"),
        ("train:\n  lr: 1\n  lr: 2", "duplicate key 'lr'"),
        ("train: {learning_rate: 1}", "unknown key 'train.learning_rate'"),
        ("trian: {lr: 1}", "Valid keys: run, encoder, task"),
        ("train: [1, 2]", "train: Input should be a valid dictionary"),
        ("- 1", "mapping of sections"),
        ("false", "mapping of sections"),
        (
            "run: {name: 001}",
            "run.name: Input should be a valid string: put quotes around text that YAML reads",
        ),
        ("task: {labels: [yes, no]}", "put quotes around text that YAML reads otherwise (given: True)"),
        ("run: {name: 2024-13-45}", "not valid YAML: month must be in 1..12; put quotes around text"),
        ("run: {name: !!bool maybe}", "not valid YAML: 'maybe'"),
        ("run: {name: !!timestamp soon}", "not valid YAML"),
        ("run: {name: \0}", "not valid YAML: unacceptable character"),
        ("run: " + 3000 * "[", "more than 64 mappings and lists stand within each other"),
        ("train: {lr: [}", "not valid YAML"),
        ("? [train, lr]\n: 1", "not valid YAML"),
        ("train: {steps: 10, lr: -1}", "greater than 0 (given: -1)"),
        ("adapter: {prompt_init: text}", "needs adapter.prompt_text"),
        ("adapter: {method: linear-probe, pooling: prompt}", "needs a prompt, which adapter.method"),
        ("adapter: {method: linear-probe, pooling: prompt-first}", "needs a prompt, which adapter.method"),
        ("adapter: {cell_layers: []}", "must name at least one layer"),
        ("adapter: {cell_layers: [1, 0, 1]}", "[1, 0, 1] must name at least one layer, each once"),
        ("adapter: {cell_layers: [-1]}", "greater than or equal to 0 (given: -1)"),
    ],
)
def test_a_bad_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        config.load(recipe(tmp_path, text))
    assert message in str(error.value)


@pytest.mark.parametrize("content", ["café".encode("latin-1"), "café".encode("utf-16")])
def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"run: {name: '" + content + b"'}")
    with pytest.raises(UserError, match=r"r\.yaml is not UTF-8 text \(.* at byte \d+\): convert it"):
        config.load(str(file))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("run: {name: café}", encoding="utf-8-sig")
    assert config.load(str(file)).run.name == "café"


def test_an_empty_section_is_one_without_settings(tmp_path: Path) -> None:
    written = recipe(tmp_path, "run: {name: a}\ntrain:\n  # lr: 1\n")
    assert config.load(written).train == config.TrainConfig()
    assert config.load(written, {"train.lr": "0.5"}).train.lr == 0.5
    with pytest.raises(UserError, match=r"train is a mapping of keys to values \(given: 3\)"):
        config.load(recipe(tmp_path, "train: 3"), {"train.lr": "0.5"})


def test_a_mapping_may_be_merged_into_another_which_has_the_last_word() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: *b, y: 4}"
    assert schema.parse_yaml(text, "text") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": {"x": 1, "y": 4},
    }


def test_an_unknown_key_is_answered_with_the_valid_ones() -> None:
    with pytest.raises(UserError) as error:
        config.build({}, {"engine.zero": "3"})
    _, _, listed = str(error.value).partition("Valid keys: ")
    assert listed.split(", ") == [key for key in schema.all_keys(config.Config) if key.startswith("engine.")]
    assert {"engine.zero_stage", "engine.ranks", "engine.dtype"} <= set(listed.split(", "))


def test_warm_up_is_a_share_or_a_number_of_steps() -> None:
    share, count = (config.load("rte", {"train.warmup": w}).train for w in ("0.1", "30"))
    assert (config.warmup_steps(share, 205), config.warmup_steps(count, 205)) == (21, 30)
