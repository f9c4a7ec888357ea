"""What a step holds depends on seed and data alone; ranks only share it out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gpc_dist.tasks import EpochPlan, Sizes, evaluation_batches, share
from gpc_dist.tasks.batching import POOL_BATCHES


def make_sizes(count: int, most_rows: int = 1, seed: int = 0) -> Sizes:
    random = np.random.default_rng(seed)
    return Sizes(
        rows=random.integers(1, most_rows + 1, count),
        longest=random.integers(4, 257, count),
    )


def lists(batches: list[np.ndarray]) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


@pytest.mark.parametrize("count", [1, 7, 64, 1000, 3333])
@pytest.mark.parametrize(("batch_size", "batch_tokens"), [(1, None), (8, None), (32, 2048)])
def test_an_epoch_holds_every_example_once(count: int, batch_size: int, batch_tokens: int | None) -> None:
    plan = EpochPlan(make_sizes(count, most_rows=3), 5, batch_size, batch_tokens)
    for epoch in range(2):
        steps = plan.steps(epoch)
        assert sorted(np.concatenate(steps).tolist()) == list(range(count))
        assert all(len(step) for step in steps)


@pytest.mark.parametrize("count", [100, 1600, 1601])
def test_all_batches_but_one_are_whole(count: int) -> None:
    lengths = [len(step) for step in EpochPlan(make_sizes(count), 0, 16).steps(0)]
    assert len(lengths) == -(-count // 16)
    assert sorted(lengths)[1:] == [16] * (len(lengths) - 1)


def test_a_token_budget_is_kept_unless_one_example_exceeds_it() -> None:
    sizes = make_sizes(2000, most_rows=12)
    for step in EpochPlan(sizes, 1, 32, batch_tokens=1500).steps(0):
        assert sizes.padded_tokens(step) <= 1500 or len(step) == 1


def test_seed_and_epoch_decide_the_steps() -> None:
    sizes = make_sizes(500)
    plan = EpochPlan(sizes, 3, 16)
    assert lists(plan.steps(1)) == lists(EpochPlan(sizes, 3, 16).steps(1))
    assert lists(plan.steps(1)) != lists(plan.steps(0))
    assert lists(plan.steps(0)) != lists(EpochPlan(sizes, 4, 16).steps(0))


def test_pools_save_padding_and_keep_batches_in_random_order() -> None:
    sizes = make_sizes(4000)
    steps = EpochPlan(sizes, 0, 16).steps(0)
    real = int(sizes.longest.sum())
    assert real / sum(sizes.padded_tokens(step) for step in steps) > 0.95
    pool = make_sizes(16 * POOL_BATCHES)
    longest = [int(pool.longest[step].max()) for step in EpochPlan(pool, 0, 16).steps(0)]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.4


@pytest.mark.parametrize("batch_tokens", [None, 3000])
def test_batches_can_be_entered_at_any_step(batch_tokens: int | None) -> None:
    plan = EpochPlan(make_sizes(150, most_rows=2), 2, 16, batch_tokens)
    whole = list(itertools.islice(plan.batches(), 30))
    for start in (0, 1, 9, 10, 11, 25):
        resumed = itertools.islice(plan.batches(start), 30 - start)
        for (epoch, indices), (epoch_again, again) in zip(whole[start:], resumed, strict=True):
            assert epoch == epoch_again
            assert indices.tolist() == again.tolist()
        epoch, index = plan.locate(start)
        assert plan.steps(epoch)[index].tolist() == whole[start][1].tolist()


def test_total_steps_of_whole_and_part_epochs() -> None:
    plan = EpochPlan(make_sizes(155), 0, 16)  # ten steps an epoch
    assert [plan.total_steps(epochs) for epochs in (1, 3, 0.5, 1.1, 0.01)] == [10, 30, 5, 11, 1]
    by_tokens = EpochPlan(make_sizes(155), 0, 16, batch_tokens=2000)
    assert by_tokens.total_steps(2) == len(by_tokens.steps(0)) + len(by_tokens.steps(1))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 5, 32, 100])
@pytest.mark.parametrize("budget", [None, 600, 5000])
@pytest.mark.parametrize("most_rows", [1, 10])
def test_sharing_gives_every_example_to_one_place(
    world: int, count: int, budget: int | None, most_rows: int
) -> None:
    sizes, prompt = make_sizes(300, most_rows, seed=count), 20
    step = np.random.default_rng(1).permutation(300)[:count]
    parts = [
        share(step, sizes, rank, world, micro_batch_tokens=budget, prompt_tokens=prompt)
        for rank in range(world)
    ]
    assert len({len(part) for part in parts}) == 1
    assert len(parts[0]) == 1 or budget is not None
    placed = np.concatenate([micro for part in parts for micro in part])
    assert sorted(placed.tolist()) == sorted(step.tolist())
    if budget is not None:
        for micro in itertools.chain(*parts):
            assert sizes.padded_tokens(micro, prompt) <= budget or len(micro) == 1
    if count >= world * len(parts[0]):
        assert all(len(micro) for part in parts for micro in part)


def test_ranks_get_near_equal_padded_work() -> None:
    sizes = make_sizes(3200)
    for step in EpochPlan(sizes, 0, 64).steps(0)[:20]:
        work = [sizes.padded_tokens(share(step, sizes, r, 4, prompt_tokens=20)[0], 20) for r in range(4)]
        assert max(work) <= 1.25 * np.mean(work)


def test_ranks_run_rows_of_similar_length_together() -> None:
    sizes = make_sizes(256)
    parts = [share(np.arange(256), sizes, rank, 4, micro_batch_tokens=2048) for rank in range(4)]
    assert len(parts[0]) > 2
    rounds = [sizes.longest[np.concatenate(micros)] for micros in zip(*parts, strict=True)]
    for longer, shorter in itertools.pairwise(rounds):
        assert longer.min() >= shorter.max()


def test_one_long_example_does_not_pad_the_others() -> None:
    sizes = Sizes(rows=np.ones(31, np.int64), longest=np.array([500] + [20] * 30))
    parts = [share(np.arange(31), sizes, rank, 2)[0] for rank in range(2)]
    assert sorted(len(part) for part in parts) == [1, 30]


def test_no_budget_means_as_few_rounds_as_possible() -> None:
    sizes = make_sizes(256)
    order = np.arange(256)
    rounds = len(share(order, sizes, 0, 4, micro_batch_tokens=4096))
    least = int(sizes.longest.sum()) / (4 * 4096)
    assert least <= rounds <= 1.3 * least + 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_further_pass_is_run_where_it_saves_padding(world: int) -> None:
    """Eight lanes' batches, each of rows of one length: in one pass all are as long as the longest lane's."""
    lengths = np.repeat([5, 8, 9, 12, 20, 21, 40, 60], 16)
    sizes, prompt = Sizes(np.ones(128, np.int64), lengths), 10

    def padded(parts: list[list[np.ndarray]]) -> int:
        return sum(sizes.padded_tokens(micro, prompt) for part in parts for micro in part)

    one = [share(np.arange(128), sizes, rank, world, prompt_tokens=prompt) for rank in range(world)]
    several = [
        share(np.arange(128), sizes, rank, world, prompt_tokens=prompt, pass_tokens=50)
        for rank in range(world)
    ]
    assert sorted(np.concatenate([micro for part in several for micro in part])) == list(range(128))
    assert len({len(part) for part in several}) == 1
    assert padded(several) <= 1.15 * int((lengths + prompt).sum())
    assert padded(one) - padded(several) > 50 * world * (len(several[0]) - 1)


def test_rows_of_one_length_are_run_in_one_pass() -> None:
    sizes = Sizes(np.ones(64, np.int64), np.full(64, 30))
    assert len(share(np.arange(64), sizes, 0, 1, prompt_tokens=10, pass_tokens=50)) == 1


@pytest.mark.parametrize("world", [1, 2, 5])
def test_evaluation_holds_every_example_once_for_any_world(world: int) -> None:
    sizes = make_sizes(777, most_rows=6)
    parts = [evaluation_batches(sizes, rank, world, 4096) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(np.concatenate([b for part in parts for b in part]).tolist()) == list(range(777))
    assert all(sizes.padded_tokens(b) <= 4096 or len(b) == 1 for part in parts for b in part)


def test_more_ranks_than_examples_leaves_empty_places() -> None:
    sizes = make_sizes(2)
    parts = [evaluation_batches(sizes, rank, 4, 4096) for rank in range(4)]
    assert sorted(len(part[0]) for part in parts) == [0, 0, 1, 1]
    assert all(part[0].dtype == np.int64 for part in parts)
