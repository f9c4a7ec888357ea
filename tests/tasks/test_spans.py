"""Spans that rows of WSC name by a text and a place: found in the row's text, and marked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpc_dist.errors import UserError
from gpc_dist.tasks.superglue import locate_span, mark


def test_spans_of_the_official_wsc_rows_are_found(superglue: Path) -> None:
    lines = (superglue / "WSC" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    found = 0
    for row in map(json.loads, lines):
        for k in (1, 2):
            span = row["target"][f"span{k}_text"]
            start, end = locate_span(row["text"], span, row["target"][f"span{k}_index"])
            found += row["text"][start:end].lower().split() == span.lower().split()
    assert found == 2 * len(lines)


@pytest.mark.parametrize(
    ("text", "span", "index", "expected"),
    [
        ("It fell, and it broke.", "it", 3, "it"),
        ("It fell, and it broke.", "it", 0, "It"),
        ('Give it to him," she said.', "him", 3, "him"),
        ("The dog saw a dog.", "dog", 3, "dog"),
        ("Emma's mother waved.", "Emma", 0, "Emma"),
        ("Near the old  mill he stopped.", "the old mill", 1, "the old  mill"),
        ("Then the tape, which tore", "the tape.", 0, "the tape"),
        ("One two three four", "nowhere here", 1, "two three"),
    ],
)
def test_spans_are_found_by_text_near_their_index(text: str, span: str, index: int, expected: str) -> None:
    start, end = locate_span(text, span, index)
    assert text[start:end] == expected


def test_the_occurrence_nearest_to_the_index_is_taken() -> None:
    text = "a dog and a dog and a dog"
    assert locate_span(text, "dog", 5)[0] == text.index("dog", 5)
    assert locate_span(text, "dog", 99)[0] == text.rindex("dog")
    # the words are `"it`, `and`, `"it`: a quote before a word does not count as one
    assert locate_span('"it and "it', "it", 2) == (9, 11)


@pytest.mark.parametrize(
    ("text", "span", "expected"),
    [
        ("it " * 150_000, "it", (300, 302)),
        ("a " + "! " * 100_000 + "it", "it" + " !" * 200 + " " * 1_000_000 + "is", (200, 603)),
    ],
)
def test_a_span_in_a_long_text_is_found_in_time_that_grows_with_it(
    text: str, span: str, expected: tuple[int, int]
) -> None:
    # the square of these lengths would take longer than a test may
    assert locate_span(text, span, 100) == expected


def test_a_span_as_long_as_a_text_is_refused() -> None:
    with pytest.raises(UserError, match="a span has 200001 characters, and may have 500"):
        locate_span("a!" * 200_000, "a!" * 100_000 + "b", 0)


def test_marks_of_touching_spans_do_not_cross() -> None:
    assert mark("ab", {"*": (0, 1), "#": (1, 2)}) == "* a *# b #"
