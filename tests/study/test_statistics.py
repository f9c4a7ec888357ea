"""The bootstrap, against scores computed one draw at a time and against what theory says of simple cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from gpc_dist.study.statistics import draw_units, interval, resampled, score_draws, units
from gpc_dist.tasks import metrics
from gpc_dist.tasks.example import Example

RANDOM = np.random.Generator(np.random.PCG64(3))


def classes(count: int, kinds: int = 3) -> tuple[list[Example], np.ndarray]:
    """Examples, and decisions of which two thirds are right."""
    targets = RANDOM.integers(kinds, size=count)
    wrong = RANDOM.integers(kinds, size=count)
    decisions = np.where(RANDOM.random(count) < 0.5, targets, wrong)
    return [Example(n, (), int(t)) for n, t in enumerate(targets)], decisions


def test_single_examples_are_drawn_unless_they_share_a_text_or_a_question() -> None:
    examples = [
        Example(0, (), 1, source="a"),
        Example(1, (), 0),
        Example(2, (), 0, source="a"),
        Example(3, (), 1, group=("q", 1)),
        Example(4, (), 1, group=("q", 1)),
    ]
    assert [unit.tolist() for unit in units(examples)] == [[0, 2], [1], [3, 4]]


def test_a_source_and_a_group_of_one_name_are_two_things() -> None:
    examples = [
        Example(0, (), 1, source=2),
        Example(1, (), 1, group=2),
        Example(2, (), 1),
        Example(3, (), 1, group=0, source=0),
        Example(4, (), 1, group=1, source=0),
    ]
    assert [unit.tolist() for unit in units(examples)] == [[0], [1], [2], [3, 4]]


def test_every_unit_is_as_likely_and_a_seed_fixes_the_draws() -> None:
    drawn = draw_units(7, 4000)
    assert drawn.shape == (4000, 7)
    counts = np.bincount(drawn.flatten(), minlength=7)
    assert len(counts) == 7
    np.testing.assert_allclose(counts / drawn.size, 1 / 7, rtol=0.05)
    assert len(np.unique(drawn, axis=0)) > 3900
    np.testing.assert_array_equal(draw_units(7, 4000, seed=0), drawn)
    assert not np.array_equal(draw_units(7, 4000, seed=1), drawn)


@pytest.mark.parametrize(("level", "ends"), [(None, (2.5, 97.5)), (0.9, (5.0, 95.0)), (0.5, (25.0, 75.0))])
def test_the_ends_of_an_interval_leave_the_same_share_on_both_sides(
    level: float | None, ends: tuple[float, float]
) -> None:
    values = RANDOM.permutation(np.arange(101.0))
    assert interval(values, *([] if level is None else [level])) == pytest.approx(ends)


def test_accuracy_f1_and_matthews_of_a_draw_are_those_of_the_drawn_examples() -> None:
    examples, decisions = classes(40)
    targets = np.array([example.target for example in examples])
    drawn = draw_units(40, 25)
    expected = {
        metrics.accuracy: lambda t, d: (t == d).mean(),
        metrics.f1_macro: lambda t, d: f1_score(t, d, average="macro", zero_division=0),
        metrics.matthews: matthews_corrcoef,
    }
    for metric, direct in expected.items():
        mine = score_draws(metric, examples, decisions, drawn)
        np.testing.assert_allclose(mine, [direct(targets[line], decisions[line]) for line in drawn])


def test_a_question_drawn_twice_counts_twice() -> None:
    """MultiRC's exact match by hand: three texts with 2, 1 and 1 questions."""
    questions = [("a", 0), ("a", 0), ("a", 1), ("b", 2), ("b", 2), ("c", 3)]
    examples = [Example(n, (), 1, group=q, source=text) for n, (text, q) in enumerate(questions)]
    decisions = np.array([1, 1, 0, 1, 0, 1])  # right are question 0 and question 3
    drawn = np.array([[0, 0, 2], [1, 1, 1], [0, 1, 2]])
    mine = score_draws(metrics.multirc_exact_match, examples, decisions, drawn)
    np.testing.assert_allclose(mine, [3 / 5, 0.0, 2 / 4])


def test_a_string_metric_of_a_draw_is_that_of_the_drawn_examples() -> None:
    meta = {"candidates": ["New York", "York", "London"], "answers": ["York"]}
    examples = [Example(n, (), (1,), meta=meta) for n in range(3)]
    decisions = np.array([0, 1, 2])
    drawn = draw_units(3, 8)
    for metric in (metrics.record_f1, metrics.record_exact_match):
        direct = [metric([examples[n] for n in line], decisions[line]) for line in drawn]
        np.testing.assert_allclose(score_draws(metric, examples, decisions, drawn), direct)


def test_the_spread_of_draws_is_the_standard_error() -> None:
    """Of a share: sqrt(p (1 - p) / n)."""
    count, right = 500, 350
    examples = [Example(n, (), 1) for n in range(count)]
    decisions = np.array([1] * right + [0] * (count - right))
    draws = resampled([metrics.accuracy], examples, [decisions], draw_units(count, 4000))
    share = right / count
    error = (share * (1 - share) / count) ** 0.5
    assert draws.mean() == pytest.approx(share, abs=3 * error / 4000**0.5)
    assert draws.std() == pytest.approx(error, rel=0.05)
    low, high = interval(draws)
    assert (low, high) == pytest.approx((share - 1.96 * error, share + 1.96 * error), abs=0.15 * error)


def test_questions_on_one_text_are_not_independent() -> None:
    """Ten answers that stand and fall together are one observation: the interval is sqrt(10) times as wide."""
    alone = [Example(n, (), 1) for n in range(1000)]
    decisions = np.repeat(RANDOM.integers(2, size=100), 10)
    together = [replace(example, source=n // 10) for n, example in enumerate(alone)]
    one = resampled([metrics.accuracy], alone, [decisions], draw_units(1000, 3000))
    ten = resampled([metrics.accuracy], together, [decisions], draw_units(100, 3000))
    assert ten.std() / one.std() == pytest.approx(10**0.5, rel=0.07)


def test_methods_are_compared_on_the_same_draws() -> None:
    examples, decisions = classes(60)
    drawn = draw_units(60, 50)
    better = decisions.copy()
    wrong = next(n for n, example in enumerate(examples) if example.target != decisions[n])
    better[wrong] = examples[wrong].target
    first = resampled([metrics.accuracy], examples, [decisions], drawn)
    difference = resampled([metrics.accuracy], examples, [better], drawn) - first
    # they differ in one example: in each draw by as often as it was drawn
    np.testing.assert_allclose(difference, (drawn == wrong).sum(axis=1) / 60)


def test_runs_and_metrics_are_averaged() -> None:
    examples, one = classes(30)
    other = RANDOM.permutation(one)
    drawn = draw_units(30, 10)
    found = resampled([metrics.accuracy, metrics.f1_macro], examples, [one, other], drawn)
    parts = [
        score_draws(metric, examples, run, drawn)
        for metric in (metrics.accuracy, metrics.f1_macro)
        for run in (one, other)
    ]
    np.testing.assert_allclose(found, sum(parts) / 4)
