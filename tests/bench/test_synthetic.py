"""Synthetic examples: lengths as asked for, and batches like those of real ones."""

from __future__ import annotations

import numpy as np
import pytest

from gpc_dist.bench.synthetic import SUPERGLUE, draw_lengths, synthetic
from gpc_dist.errors import UserError
from gpc_dist.tasks import collate


def test_fixed_lengths_are_the_greatest() -> None:
    assert draw_lengths("fixed", 5, 48).tolist() == [48] * 5


@pytest.mark.parametrize("task", SUPERGLUE)
def test_a_tasks_lengths_have_its_median_and_spread(task: str) -> None:
    median, spread = SUPERGLUE[task]
    drawn = draw_lengths(task, 20_000, 100_000)
    assert np.median(drawn) == pytest.approx(median, rel=0.05)
    assert np.log(drawn).std() == pytest.approx(spread, rel=0.1)


def test_the_mix_has_as_many_rows_of_each_task() -> None:
    drawn = draw_lengths("mix", 6000, 512)
    for place, (median, _) in enumerate(SUPERGLUE.values()):
        assert np.median(drawn[place :: len(SUPERGLUE)]) == pytest.approx(median, rel=0.1)
    assert drawn.max() == 512


def test_lengths_depend_on_the_seed_alone() -> None:
    assert draw_lengths("mix", 99, 64, seed=1).tolist() == draw_lengths("mix", 99, 64, seed=1).tolist()
    assert draw_lengths("mix", 99, 64, seed=1).tolist() != draw_lengths("mix", 99, 64, seed=2).tolist()


def test_unknown_lengths_name_the_known_ones() -> None:
    with pytest.raises(UserError, match="'long' is unknown: give one of fixed, mix, boolq"):
        draw_lengths("long", 1, 64)


def test_a_batch_holds_rows_of_the_lengths_given() -> None:
    lengths = np.array([7, 3, 5])
    encoded = synthetic(lengths, vocabulary=11)
    assert encoded.lengths.tolist() == lengths.tolist()
    batch = collate(encoded, [2, 0], pad_id=0)
    assert batch.attention_mask.sum(dim=1).tolist() == [5, 7]
    assert int(batch.input_ids.max()) < 11
    assert batch.targets is not None
    assert set(batch.targets.tolist()) <= {0, 1}
