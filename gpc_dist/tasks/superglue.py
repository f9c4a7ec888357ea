"""The eight SuperGLUE tasks (Wang et al., 2019, arXiv 1905.00537) as examples.

Every adapter below is a pure function from one source row to examples. It takes the rows of the
official JSON Lines files as well as those of `super_glue` on the Hub, which differ in MultiRC and
ReCoRD (nested in the files, flat on the Hub), WSC (`target` or flat) and labels (names or indices).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from gpc_dist.errors import UserError
from gpc_dist.tasks import metrics
from gpc_dist.tasks.benchmark import Spec, class_index
from gpc_dist.tasks.example import Example
from gpc_dist.tasks.formats import Row
from gpc_dist.tasks.metrics import Metric

_BOOLEAN = ("false", "true")
_CB = ("entailment", "contradiction", "neutral")
_LONGEST = 500
"""Characters of a span, which may all be compared at each word of a text."""
_PLACE = "@placeholder"
"""Where an entity stands in a query."""
_LARGEST = 2**22
"""Characters that the questions or entities of a row may become, which stand in it once and are repeated for each
answer or query: a row of a MiB could stand for more than a machine holds."""
RTE = ("entailment", "not_entailment")
"""Labels of RTE, and of the diagnostics that its adapters answer."""


def _boolq(row: Row) -> Iterator[Example]:
    texts = (row["question"], row["passage"])
    yield Example(row["idx"], (texts,), class_index(row, _BOOLEAN))


def _entailment(labels: tuple[str, ...], row: Row) -> Iterator[Example]:
    texts = (row["premise"], row["hypothesis"])
    yield Example(row["idx"], (texts,), class_index(row, labels))


def _copa(row: Row) -> Iterator[Example]:
    choices = (row["choice1"], row["choice2"])
    joiner = {"cause": "because", "effect": "so"}[row["question"]]
    # without the full stop, premise, joiner and choice make one sentence
    premise = f"{row['premise'].rstrip('. ')} {joiner}"
    right = class_index(row, ("choice1", "choice2"))
    yield Example(
        row["idx"],
        tuple((premise, choice) for choice in choices),
        None if right is None else (right,),
        meta={"candidates": choices},
    )


def _multirc(row: Row) -> Iterator[Example]:
    if "paragraph" in row:  # the Hub's flat rows
        idx = row["idx"]
        if not isinstance(idx, dict):  # not from the data set: each row is a question of its own
            idx = {"paragraph": idx, "question": idx, "answer": idx}
        yield _multirc_answer(idx, row["paragraph"], row["question"], row["answer"], row)
        return
    questions = row["passage"]["questions"]
    _check_size(sum(len(each["question"]) * len(each["answers"]) for each in questions))
    for question in questions:
        for answer in question["answers"]:
            idx = {"paragraph": row["idx"], "question": question["idx"], "answer": answer["idx"]}
            text = row["passage"]["text"]
            yield _multirc_answer(idx, text, question["question"], answer["text"], answer)


def _multirc_answer(
    idx: dict[str, int], paragraph: str, question: str, answer: str, labelled: Row
) -> Example:
    return Example(
        idx,
        ((paragraph, f"{question} {answer}"),),
        class_index(labelled, _BOOLEAN),
        group=(idx["paragraph"], idx["question"]),
        source=idx["paragraph"],
    )


def _record(row: Row) -> Iterator[Example]:
    passage = row["passage"]
    if isinstance(passage, str):  # the Hub's flat rows
        answers = row.get("answers", [])
        _check_size(_filled(row["query"], row["entities"]))
        yield _record_query(row["idx"], passage, row["entities"], row["query"], answers)
        return
    text = passage["text"]
    _check_size(len(text) * len(passage["entities"]))
    # `end` is the last character's index
    entities = [text[entity["start"] : entity["end"] + 1] for entity in passage["entities"]]
    _check_size(sum(_filled(query["query"], entities) for query in row["qas"]))
    for query in row["qas"]:
        idx = {"passage": row["idx"], "query": query["idx"]}
        answers = [answer["text"] for answer in query.get("answers", [])]
        yield _record_query(idx, text, entities, query["query"], answers)


def _filled(query: str, entities: list[str]) -> int:
    """Characters of a query with each entity in its place, or more."""
    return len(query) * len(entities) + query.count(_PLACE) * sum(map(len, entities))


def _check_size(made: int) -> None:
    if made > _LARGEST:
        raise UserError(
            f"the row stands for {made} characters, and may for {_LARGEST}: write it as several rows"
        )


def _record_query(idx: Any, passage: str, entities: list[str], query: str, answers: list[str]) -> Example:
    candidates = tuple(dict.fromkeys(entities))
    given = set(answers)
    right = tuple(i for i, candidate in enumerate(candidates) if candidate in given)
    if answers and not right:
        raise UserError(f"no entity of the passage is an answer to query '{query}'")
    # the article is followed by the news site's summary, each point after a marker line
    passage = re.sub(r"(?<=[.!?])\n@highlight\n", " ", passage).replace("\n@highlight\n", ". ")
    return Example(
        idx,
        tuple((passage, query.replace(_PLACE, entity)) for entity in candidates),
        right or None,
        source=idx["passage"] if isinstance(idx, dict) else None,
        meta={"candidates": candidates, "answers": tuple(dict.fromkeys(answers))},
    )


def _wic(row: Row) -> Iterator[Example]:
    first, second = (mark(row[f"sentence{k}"], {"*": (row[f"start{k}"], row[f"end{k}"])}) for k in (1, 2))
    texts = (f"{row['word']}: {first}", second)
    yield Example(row["idx"], (texts,), class_index(row, _BOOLEAN))


def _wsc(row: Row) -> Iterator[Example]:
    span = row.get("target", row)
    text = mark(
        row["text"],
        {
            sign: locate_span(row["text"], span[f"span{k}_text"], span[f"span{k}_index"])
            for k, sign in ((1, "*"), (2, "#"))
        },
    )
    yield Example(row["idx"], ((text, None),), class_index(row, _BOOLEAN))


def mark(text: str, spans: Mapping[str, tuple[int, int]]) -> str:
    """The text with each span `[start, end)` between two of its signs: `the * trophy * fits`.

    With the spaces inside, byte-pair vocabularies give the marked word its usual tokens: those of a
    word after a space differ from those of a word after a sign.
    """
    inserts = [(end, 0, f" {sign}") for sign, (_, end) in spans.items()]
    inserts += [(start, 1, f"{sign} ") for sign, (start, _) in spans.items()]
    for position, _, sign in sorted(inserts, reverse=True):
        text = text[:position] + sign + text[position:]
    return text


def locate_span(text: str, span: str, index: int) -> tuple[int, int]:
    """Characters `[start, end)` of a span given by its text and the index of its first word.

    WSC's indices count words between white space, but some are off by a few, and the words they
    point at may carry punctuation (`him,"`), a possessive or another case. The result is the
    occurrence nearest to the index, or the words at the index if the span's text does not occur.
    """
    # not by `\W+$`, which takes the square of the time for a long row of signs
    inner = re.search(r"\w(.*\w)?", span, re.DOTALL)
    words = inner[0].split() if inner else []
    if (length := sum(map(len, words))) > _LONGEST:
        raise UserError(
            f"a span has {length} characters, and may have {_LONGEST}: give the words that are meant"
        )
    pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, words)) + r"(?!\w)"
    matches = list(re.finditer(pattern, text, re.IGNORECASE))
    if matches:
        ends = [match.end() for match in re.finditer(r"\S\s", text)]
        return min(matches, key=lambda match: abs(bisect_right(ends, match.start()) - index)).span()
    phrase = list(re.finditer(r"\S+", text))[index : index + len(words)]
    if not phrase:
        raise UserError(f"span '{span}' is neither in the text nor at its word {index}")
    return phrase[0].start(), phrase[-1].end()


_ACCURACY: dict[str, Metric] = {"accuracy": metrics.accuracy}
_YES_NO = ("no", "yes")

# Labels stand in the order of the Hub's indices.
SPECS = {
    "boolq": Spec(_boolq, ("question", "passage"), "classification", _BOOLEAN, _YES_NO, _ACCURACY),
    "cb": Spec(
        partial(_entailment, _CB),
        ("premise", "hypothesis"),
        "classification",
        _CB,
        _CB,
        {"accuracy": metrics.accuracy, "f1_macro": metrics.f1_macro},
    ),
    "copa": Spec(
        _copa,
        ("premise", "question", "choice1", "choice2"),
        "choice",
        (),
        ("cause", "effect"),
        _ACCURACY,
    ),
    "multirc": Spec(
        _multirc,
        ("paragraph", "question", "answer"),
        "classification",
        _BOOLEAN,
        _YES_NO,
        {"f1_a": metrics.multirc_f1, "exact_match": metrics.multirc_exact_match},
    ),
    "record": Spec(
        _record,
        ("passage", "query", "entities"),
        "choice",
        (),
        ("entity", "answer"),
        {"f1": metrics.record_f1, "exact_match": metrics.record_exact_match},
    ),
    "rte": Spec(
        partial(_entailment, RTE),
        ("premise", "hypothesis"),
        "classification",
        RTE,
        ("entailment", "not entailment"),
        _ACCURACY,
    ),
    "wic": Spec(
        _wic,
        ("word", "sentence1", "start1", "end1", "sentence2", "start2", "end2"),
        "classification",
        _BOOLEAN,
        ("different", "same"),
        _ACCURACY,
    ),
    "wsc": Spec(
        _wsc,
        ("text", "span1_text", "span1_index", "span2_text", "span2_index"),
        "classification",
        _BOOLEAN,
        _YES_NO,
        _ACCURACY,
    ),
}
