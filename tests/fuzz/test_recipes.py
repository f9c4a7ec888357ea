"""Recipes, searches, studies, DeepSpeed files and overrides: they load and mean what they say, or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gpc_dist import config, deepspeed_file, schema
from gpc_dist.config import Config
from gpc_dist.errors import UserError
from gpc_dist.parsing import parse_json, parse_yaml, to_yaml
from gpc_dist.search import space
from gpc_dist.search import spec as search
from gpc_dist.shipped import shipped_folder
from gpc_dist.study import spec as study
from tests.fuzz.conftest import FUZZ, judged
from tests.fuzz.mutations import changed_bytes, changed_tree, plain, trees


def shipped(folder: str, name: str) -> Any:
    return yaml.safe_load((shipped_folder(folder) / name).read_text())


RECIPE = shipped("recipes", "demo.yaml")
SEARCH = shipped("tune", "demo.yaml")
STUDY = shipped("tune", "studies/minilm.yaml")
REGIME = json.loads((shipped_folder("ds_configs") / "zero3.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def put(folder: Path, content: str | bytes) -> str:
    path = folder / "it.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    return str(path)


def dumped(tree: Any) -> str:
    """As PyYAML writes it, half characters and all."""
    return str(yaml.safe_dump(tree, sort_keys=False))


@FUZZ
@given(tree=changed_tree(RECIPE, 3))
def test_a_recipe_that_loads_is_written_as_it_was_read(folder: Path, tree: Any) -> None:
    found = judged(lambda: config.load(put(folder, dumped(tree))), listed=True)
    if isinstance(found, Config):
        again = config.load(put(folder, found.to_yaml()))
        assert again == found
        for section, keys in tree.items():
            for key, value in (keys or {}).items():
                # a value of the file's own type is taken as it is
                held = found.model_dump(mode="json")[section][key]
                assert type(held) is not type(value) or held == value or isinstance(value, str | list | float)


@FUZZ
@given(tree=changed_tree(SEARCH, 3))
def test_a_search_is_checked_before_it_begins(folder: Path, tree: Any) -> None:
    def load() -> search.SearchSpec:
        found = search.load(put(folder, dumped(tree)))
        space.validate(found)
        return found

    found = judged(load, listed=True)
    if isinstance(found, search.SearchSpec):
        assert search.load(put(folder, found.to_yaml())) == found


@FUZZ
@given(tree=changed_tree(STUDY, 3))
def test_a_study_is_checked_before_it_begins(folder: Path, tree: Any) -> None:
    judged(lambda: study.load(put(folder, dumped(tree))), listed=True)


@pytest.mark.parametrize("name", ["recipes/demo.yaml", "tune/demo.yaml"])
@FUZZ
@given(data=st.data())
def test_damaged_bytes_are_another_recipe_or_none(folder: Path, name: str, data: st.DataObject) -> None:
    kind, _, file = name.partition("/")
    content = data.draw(changed_bytes((shipped_folder(kind) / file).read_bytes()))
    load: Any = config.load if kind == "recipes" else search.load
    judged(lambda: load(put(folder, content)), listed=True)


@FUZZ
@given(tree=changed_tree(REGIME, 3))
def test_a_deepspeed_file_is_read_or_refused(folder: Path, tree: Any) -> None:
    path = folder / "regime.json"
    path.write_text(json.dumps(tree))
    found = judged(lambda: deepspeed_file.read(str(path)), listed=True)
    assert isinstance(found, UserError) or repr(found) == repr(tree)


KEYS = sorted(schema.all_keys(Config))


@FUZZ
@given(overrides=st.dictionaries(st.sampled_from(KEYS), st.one_of(st.text(), plain.map(str)), max_size=3))
def test_overrides_are_values_or_refused(overrides: dict[str, str]) -> None:
    judged(lambda: config.load("demo", overrides), listed=True)


@FUZZ
@given(tree=trees)
def test_what_is_written_as_yaml_is_read(tree: Any) -> None:
    text = to_yaml(tree)
    found = judged(lambda: parse_yaml(text, "it"))
    assert isinstance(found, UserError) or repr(found) == repr(tree)


@FUZZ
@given(content=st.one_of(st.binary(max_size=64), changed_bytes(json.dumps(REGIME).encode())))
def test_json_is_what_the_json_module_reads(content: bytes) -> None:
    found = judged(lambda: parse_json(content, "it"))
    if not isinstance(found, UserError):
        assert repr(found) == repr(json.loads(content.decode()))


@FUZZ
@given(
    content=st.one_of(
        st.text(), changed_bytes(dumped(SEARCH).encode()).map(lambda b: b.decode(errors="replace"))
    )
)
def test_yaml_is_what_pyyaml_reads(content: str) -> None:
    found = judged(lambda: parse_yaml(content, "it"))
    if not isinstance(found, UserError):
        assert repr(found) == repr(yaml.load(content, yaml.CSafeLoader))
