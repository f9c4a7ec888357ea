"""Metrics against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from gpc_dist.errors import UserError
from gpc_dist.tasks import Example, Task
from gpc_dist.tasks import metrics as m
from gpc_dist.tasks.example import Target


def examples(*targets: Target) -> list[Example]:
    return [Example(n, (("text", None),), target) for n, target in enumerate(targets)]


def test_accuracy_counts_any_right_candidate() -> None:
    assert m.accuracy(examples(0, 1, 1, 0), np.array([0, 1, 0, 0])) == 0.75
    assert m.accuracy(examples((0, 2), (1,)), np.array([2, 0])) == 0.5


def test_f1_macro_is_the_mean_over_classes() -> None:
    # class 0: P 2/3, R 1, F 4/5; class 1: P 1/2, R 1/2, F 1/2; class 2: never said, F 0
    right, said = examples(0, 0, 1, 1, 2), np.array([0, 0, 0, 1, 1])
    assert m.f1_macro(right, said) == pytest.approx((4 / 5 + 1 / 2 + 0) / 3)


def test_matthews() -> None:
    # TP 2, TN 1, FP 1, FN 0: (2*1 - 1*0) / sqrt(3 * 2 * 2 * 1)
    assert m.matthews(examples(1, 1, 0, 0), np.array([1, 1, 0, 1])) == pytest.approx(2 / 12**0.5)
    assert m.matthews(examples(1, 0), np.array([1, 1])) == 0.0


def test_regression_metrics() -> None:
    right, said = examples(1.0, 2.0, 3.0, 4.0), np.array([1.0, 3.0, 2.0, 8.0])
    # deviations (-1.5, -.5, .5, 1.5) and (-2.5, -.5, -1.5, 4.5): 10 / sqrt(5 * 29)
    assert m.pearson(right, said) == pytest.approx(10 / 145**0.5)
    # one swap of neighbours among four ranks: 1 - 6 * 2 / (4 * 15)
    assert m.spearman(right, said) == pytest.approx(0.8)
    assert m.rmse(right, said) == pytest.approx((18 / 4) ** 0.5)


@pytest.mark.parametrize(
    ("right", "said"), [((1.0, 2.0, 3.0), (2.0, 2.0, 2.0)), ((2.0, 2.0), (1.0, 3.0)), ((1.0,), (1.0,))]
)
def test_a_constant_and_a_single_number_have_no_correlation(
    right: tuple[float, ...], said: tuple[float, ...]
) -> None:
    assert m.pearson(examples(*right), np.array(said)) == 0.0
    assert m.spearman(examples(*right), np.array(said)) == 0.0


@pytest.mark.parametrize(
    ("right", "said", "pearson"),
    [
        ((1.0, 2.0), (5.0, 7.0), 1.0),
        ((1.0, 2.0), (7.0, 6.5), -1.0),
        ((0.0, 0.5, 0.5), (0.0, 0.25, 0.25), 1.0),
    ],
)
def test_two_numbers_and_numbers_below_one_have_a_correlation(
    right: tuple[float, ...], said: tuple[float, ...], pearson: float
) -> None:
    assert m.pearson(examples(*right), np.array(said)) == pytest.approx(pearson)
    assert m.spearman(examples(*right), np.array(said)) == pytest.approx(pearson)


@pytest.mark.parametrize("metric", [m.accuracy, m.multirc_exact_match, m.record_f1, m.record_exact_match])
@pytest.mark.parametrize("count", [1, 3])
def test_decisions_that_do_not_match_the_examples_in_number_are_an_error(
    metric: m.Metric, count: int
) -> None:
    meta = {"candidates": ("a b", "c"), "answers": ("c",)}
    two = [Example(n, (("p", "q"),) * 2, (1,), group=n, meta=meta) for n in range(2)]
    with pytest.raises(ValueError, match="is (shorter|longer) than"):
        metric(two, np.zeros(count, dtype=int))


def test_multirc() -> None:
    answers = [
        Example(n, (("p", "q"),), target, group=group)
        for n, (target, group) in enumerate([(1, (0, 0)), (0, (0, 0)), (1, (0, 1)), (1, (0, 1)), (1, (1, 0))])
    ]
    said = np.array([1, 0, 0, 1, 1])
    # all answers: TP 3, FP 0, FN 1; questions (0, 0) and (1, 0) of three are whole
    assert m.multirc_f1(answers, said) == pytest.approx(6 / 7)
    assert m.multirc_exact_match(answers, said) == pytest.approx(2 / 3)
    assert m.multirc_f1(examples(0, 0), np.array([0, 0])) == 0.0


def test_record() -> None:
    query = Example(
        0,
        (("p", "q"),) * 3,
        (0, 1),
        meta={
            "candidates": ("The U.S. Navy", "US Navy", "Navy Pier Museum"),
            "answers": ("US Navy", "the Navy"),
        },
    )
    assert m.normalize_answer("The U.S.  Navy!") == "us navy"
    for decision, f1, exact in ((0, 1.0, 1.0), (1, 1.0, 1.0), (2, 2 / 4, 0.0)):
        assert m.record_f1([query], np.array([decision])) == pytest.approx(f1)
        assert m.record_exact_match([query], np.array([decision])) == exact


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("A cat, an owl and THE dog", "cat owl and dog"),
        ("Anna's theatre at the a.m.", "annas theatre at am"),
        ("  The \t end\n", "end"),
        ("the", ""),
    ],
)
def test_normal_form_of_an_answer(text: str, normal: str) -> None:
    assert m.normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("candidate", "answers", "f1"),
    [
        ("New York City", ("York",), 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("York", ("New York City",), 0.5),
        # a word counts as often as both say it: 2 of 4 and 2 of 2
        ("la la la land", ("la la", "land"), 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("Oslo", ("Rome", "Paris"), 0.0),
        ("The", ("a",), 0.0),  # no word is left of either
    ],
)
def test_f1_of_a_chosen_entity(candidate: str, answers: tuple[str, ...], f1: float) -> None:
    meta = {"candidates": ("none", candidate), "answers": answers}
    assert m.record_f1([Example(0, (("p", "q"),) * 2, (1,), meta=meta)], np.array([1])) == pytest.approx(f1)


def test_record_is_the_mean_over_queries() -> None:
    meta = {"candidates": ("Rome", "Oslo"), "answers": ("Oslo",)}
    queries = [Example(n, (("p", "q"),) * 2, (1,), meta=meta) for n in range(4)]
    for metric in (m.record_f1, m.record_exact_match):
        assert metric(queries, np.array([1, 0, 0, 0])) == 0.25


def test_metrics_of_a_table_and_its_main_one() -> None:
    assert {kind: list(named) for kind, named in m.TABLE_METRICS.items()} == {
        "classification": ["accuracy", "f1_macro", "matthews"],
        "choice": ["accuracy"],
        "regression": ["pearson", "spearman", "rmse"],
    }
    right, said = examples(0, 0, 1, 1, 2), np.array([0, 0, 0, 1, 1])
    assert m.TABLE_METRICS["classification"]["accuracy"](right, said) == 0.6
    numbers = examples(1.0, 2.0, 3.0, 4.0), np.array([1.0, 3.0, 2.0, 8.0])
    found = {name: metric(*numbers) for name, metric in m.TABLE_METRICS["regression"].items()}
    assert found == {
        "pearson": pytest.approx(10 / 145**0.5),
        "spearman": pytest.approx(0.8),
        "rmse": pytest.approx((18 / 4) ** 0.5),
    }


def make_task(**changes: object) -> Task:
    settings = {
        "name": "moods",
        "kind": "classification",
        "labels": ("bad", "good"),
        "label_words": ("bad", "good"),
        "metrics": {"accuracy": m.accuracy, "f1_macro": m.f1_macro},
        "main_metric": "accuracy",
        "columns": ("text",),
        "reader": lambda split: examples(0, 1),
        "parser": lambda rows: examples(*[None] * len(rows)),
    }
    return Task(**{**settings, **changes})  # type: ignore[arg-type]


LOGITS = [np.array([2.0, 0.0]), np.array([0.0, 1.0]), np.array([1.0, -1.0])]


def test_score_reports_every_metric_and_the_average_where_wanted() -> None:
    right = examples(0, 1, 1)
    scores = make_task().score(right, LOGITS)
    assert scores == {"accuracy": pytest.approx(2 / 3), "f1_macro": pytest.approx(2 / 3)}
    # one class never said: accuracy 1/3, F1 of 0 and 1/2
    averaged = make_task(averaged=True, main_metric="average").score(examples(1, 1, 0), [LOGITS[0]] * 3)
    assert averaged == {
        "accuracy": pytest.approx(1 / 3),
        "f1_macro": pytest.approx(1 / 4),
        "average": pytest.approx(7 / 24),
    }


def test_predictions_carry_labels_and_probabilities() -> None:
    first = make_task().predictions(examples(0, 1, 1), LOGITS)[0]
    assert (first.id, first.value) == (0, "bad")
    assert first.probabilities == pytest.approx({"bad": np.e**2 / (1 + np.e**2), "good": 1 / (1 + np.e**2)})
    choice = make_task(kind="choice", labels=()).predictions([Example(0, (("a", "b"),) * 3)], [np.zeros(3)])
    assert (choice[0].value, list(choice[0].probabilities or ())) == (0, ["0", "1", "2"])
    number = make_task(kind="regression", labels=()).predictions(examples(0.5), [np.array([2.5])])
    assert (number[0].value, number[0].probabilities) == (2.5, None)


def test_what_a_result_says_about_the_classes() -> None:
    from sklearn.metrics import classification_report

    random = np.random.default_rng(0)
    right, decided = (
        random.integers(0, 3, 60),
        random.choice([0, 1], 60),
    )  # 2 is never predicted, 3 never occurs
    labels = ("a", "b", "c", "d")
    task = make_task(labels=labels)
    matrix = task.confusion(examples(*right.tolist()), list(np.eye(4)[decided]))
    assert matrix is not None
    assert [sum(row) for row in matrix] == np.bincount(right, minlength=4).tolist()
    assert [sum(row[k] for row in matrix) for k in range(4)] == np.bincount(decided, minlength=4).tolist()
    found = task.by_class(matrix)
    assert found["confusion_matrix"] == {"labels": list(labels), "counts": matrix}
    report = classification_report(
        right, decided, labels=range(4), target_names=labels, zero_division=0, output_dict=True
    )
    for label, scores in found["per_class"].items():
        reference = {"f1": report[label]["f1-score"], "examples": report[label]["support"]}
        reference |= {name: report[label][name] for name in ("precision", "recall")}
        assert scores == pytest.approx(reference)
    assert list(found["per_class"]) == list(labels)
    number = make_task(kind="regression", labels=())
    assert number.by_class(number.confusion(examples(0.5), [np.array([2.5])])) == {}


def test_majority_baseline() -> None:
    baseline = make_task().majority_baseline(examples(1, 1, 0), examples(1, 0, 0, 0))
    assert baseline["accuracy"] == 0.25
    choices = [Example(n, (("a", "b"),) * 2, (n % 2,)) for n in range(3)]  # right: 0, 1, 0
    choice = make_task(kind="choice", labels=(), metrics={"accuracy": m.accuracy})
    assert choice.majority_baseline(choices, choices) == {"accuracy": pytest.approx(2 / 3)}
    numbers = make_task(kind="regression", labels=(), metrics={"rmse": m.rmse}, main_metric="rmse")
    assert numbers.majority_baseline(examples(1.0, 3.0), examples(2.0, 4.0))["rmse"] == 2**0.5
    assert not numbers.greater_is_better
    assert choice.greater_is_better


def test_outputs_of_the_head() -> None:
    assert make_task().outputs == 2
    assert make_task(kind="choice", labels=()).outputs == 1


def test_what_has_no_label_cannot_be_scored_or_trained_on() -> None:
    with pytest.raises(UserError, match="no label at example 1"):
        make_task().score(examples(0, None), LOGITS[:2])
    unlabelled = make_task(reader=lambda split: examples(0, None))
    assert len(unlabelled.read("test")) == 2
    with pytest.raises(UserError, match="the validation split of task moods has no label"):
        unlabelled.read("validation")


def test_an_unknown_metric_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"task.metric to one of accuracy, f1_macro"):
        make_task(main_metric="bleu")
