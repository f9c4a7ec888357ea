"""YAML and JSON of any origin."""

from __future__ import annotations

import json
import tracemalloc

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gpc_dist.errors import UserError
from gpc_dist.parsing import DEEPEST, parse_json, parse_yaml, to_yaml

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
"""About 400 bytes that stand for 9^11 values."""

CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 2000))
"""As deep as it is long."""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "recipe: line 7: its aliases stand for more than 1,000,000 values"),
        (
            CHAIN,
            f"recipe: line {DEEPEST + 1}: more than {DEEPEST} mappings and lists stand within each other",
        ),
        ("[" * 100_000, f"recipe: more than {DEEPEST} mappings and lists stand within each other"),
        ("a: &a [*a]", "recipe: line 1: an alias stands within what it names"),
        ("a: &a {b: 1}\nc: {<<: *a, b: 2, b: 3}", "recipe: duplicate key 'b' in line 2: keep one of them"),
        ("run: !!python/object/apply:os.getcwd []", "recipe is not valid YAML: line 1, column 6"),
        ("run: 2024-13-45", "recipe is not valid YAML: month must be in 1..12"),
    ],
)
def test_a_yaml_text_is_refused_before_it_grows(text: str, said: str) -> None:
    tracemalloc.start()
    with pytest.raises(UserError) as refused:
        parse_yaml(text, "recipe")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(refused.value).startswith(said)
    assert most < 10 << 20


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "a: &a {b: 1}\nc: {<<: *a, b: 2}\nd: *a", "- 1\n- [x, null]"]
)
def test_what_is_plain_yaml_is_read_as_pyyaml_reads_it(text: str) -> None:
    assert parse_yaml(text, "recipe") == yaml.safe_load(text)


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.mark.slow
@given(TREES)
def test_what_was_written_is_read(tree: object) -> None:
    assert parse_json(json.dumps(tree), "card") == tree
    assert parse_yaml(to_yaml(tree), "recipe") == tree


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "card: duplicate key 'c': keep one of them"),
        ("[" * 100_000, "card is not valid JSON: it is nested too deeply"),
        (b'{"a": "\xff"}', "card is not valid JSON: 'utf-8' codec can't decode byte 0xff"),
        (r'{"a": "\ud800"}', "card: it holds one half of a character"),
        ('{"a": 1', "card is not valid JSON: Expecting"),
        ("9" * 5000, "card is not valid JSON: Exceeds the limit"),
    ],
)
def test_a_json_text_is_refused_in_one_line(text: str | bytes, said: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_json(text, "card")
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)


def test_a_key_that_comes_again_behind_many_others_is_found_at_once() -> None:
    # to compare each with all before it would take longer than a test may
    many = ", ".join(f'"{number}": 0' for number in (*range(300_000), 299_999))
    with pytest.raises(UserError, match="card: duplicate key '299999': keep one of them"):
        parse_json(f"{{{many}}}", "card")


def test_a_character_of_two_code_units_is_one() -> None:
    assert parse_json(r'["\ud83d\ude00"]', "card") == ["😀"]
