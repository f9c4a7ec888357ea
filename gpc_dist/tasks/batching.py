"""Which examples make up a step, and which rank runs which of them.

The examples of a step depend on the seed and the data alone. Ranks, micro-batches and ZeRO stages only
divide a step, so any of them can change between two runs, or during one, without changing its
examples. This module reads the sizes of examples, not their tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

# Batches are cut from pools of this many, sorted by length: little padding, and still a random mix.
POOL_BATCHES = 50


@dataclass(frozen=True)
class Sizes:
    """Sizes of N examples."""

    rows: np.ndarray
    """int64 `[N]`: rows of the example (its candidates; 1 unless it is a choice)."""
    longest: np.ndarray
    """int64 `[N]`: tokens of its longest row."""

    def __len__(self) -> int:
        return len(self.rows)

    def padded_tokens(self, indices: np.ndarray, prompt_tokens: int = 0) -> int:
        """Tokens of these examples in one batch, with every row padded to the longest."""
        if len(indices) == 0:
            return 0
        return int(self.rows[indices].sum() * (self.longest[indices].max() + prompt_tokens))


@dataclass(frozen=True)
class EpochPlan:
    """The steps of every epoch, each an array of example indices, int64 `[B]`."""

    sizes: Sizes
    seed: int
    batch_size: int
    """Examples per step; the last one cut from an epoch may have fewer."""
    batch_tokens: int | None = None
    """Padded text tokens per step at most (one example may exceed it), instead of `batch_size`."""
    _counts: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Steps of the epochs counted so far: a token budget makes them differ."""

    def steps(self, epoch: int) -> list[np.ndarray]:
        """The steps of an epoch: every example once."""
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        order = random.permutation(len(self.sizes))
        pool = POOL_BATCHES * self._examples_per_batch
        batches = [
            batch
            for start in range(0, len(order), pool)
            for batch in self._cut_pool(order[start : start + pool])
        ]
        return [batches[i] for i in random.permutation(len(batches))]

    def batches(self, start_step: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """`(epoch, indices)` of every step from `start_step` (0-based) on, without end."""
        epoch, index = self.locate(start_step)
        while True:
            for indices in self.steps(epoch)[index:]:
                yield epoch, indices
            epoch, index = epoch + 1, 0

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step (0-based, counted from the first epoch), and its index in that epoch."""
        if self.batch_tokens is None:
            return divmod(step, self._steps_of(0))
        epoch = 0
        while step >= (count := self._steps_of(epoch)):
            step -= count
            epoch += 1
        return epoch, step

    def total_steps(self, epochs: float) -> int:
        """Steps in `epochs` epochs; a part of an epoch is rounded up to whole steps."""
        whole = math.floor(epochs)
        part = epochs - whole
        total = sum(self._steps_of(epoch) for epoch in range(whole))
        # rounded first, because 0.1 of ten steps can come out slightly above one
        return total + (math.ceil(round(part * self._steps_of(whole), 6)) if part else 0)

    def _steps_of(self, epoch: int) -> int:
        if self.batch_tokens is None:
            return math.ceil(len(self.sizes) / self.batch_size)
        if epoch not in self._counts:
            self._counts[epoch] = len(self.steps(epoch))
        return self._counts[epoch]

    @property
    def _examples_per_batch(self) -> int:
        if self.batch_tokens is None:
            return self.batch_size
        mean = float(np.mean(self.sizes.rows * self.sizes.longest))
        return max(1, int(self.batch_tokens / mean))

    def _cut_pool(self, pool: np.ndarray) -> list[np.ndarray]:
        order = _longest_first(pool, self.sizes)
        if self.batch_tokens is None:
            # only the last batch of the last pool can be short
            cuts = range(self.batch_size, len(order), self.batch_size)
            return np.split(order, list(cuts))
        return _cut(order, self.sizes, self.batch_tokens)


def share(
    indices: np.ndarray,
    sizes: Sizes,
    rank: int,
    world: int,
    *,
    micro_batch_tokens: int | None = None,
    prompt_tokens: int = 0,
    pass_tokens: int | None = None,
) -> list[np.ndarray]:
    """The micro-batches of a step that `rank` runs, int64 `[examples]` each.

    Every example is in exactly one micro-batch of one rank. All ranks have the same number of
    micro-batches, because each is a collective under ZeRO-3; some are empty if there are too few
    examples. The k-th micro-batches of all ranks have rows of similar length and nearly equal padded
    work, so that ranks do not wait for each other. Their numbers of *examples* differ, so the mean over
    ranks is not the mean over the step: divide sums by the size of the step.

    Args:
        indices: the step's examples, int64 `[B]`.
        micro_batch_tokens: most padded tokens of a micro-batch, prompt included (one example may
            exceed it: the candidates of a choice stay together); one micro-batch per rank when not
            given.
        prompt_tokens: P, added to every row.
        pass_tokens: add a micro-batch to every rank while that saves more than this many padded
            tokens per rank; as few micro-batches as possible when not given.
    """
    order = _longest_first(indices, sizes)
    whole = sizes.padded_tokens(order, prompt_tokens)
    cap = whole if micro_batch_tokens is None else min(micro_batch_tokens, whole)
    rounds = max(1, math.ceil(len(_cut(order, sizes, cap, prompt_tokens)) / world))
    parts = _equal(order, sizes, rounds * world, cap, prompt_tokens)
    while pass_tokens is not None:
        more = _equal(order, sizes, (rounds + 1) * world, cap, prompt_tokens)
        saved = _padded(parts, sizes, prompt_tokens) - _padded(more, sizes, prompt_tokens)
        if saved <= world * pass_tokens:
            break
        parts, rounds = more, rounds + 1
    return _fill(parts, rounds * world)[rank::world]


def evaluation_batches(
    sizes: Sizes, rank: int, world: int, batch_tokens: int, prompt_tokens: int = 0
) -> list[np.ndarray]:
    """The batches of a whole split that `rank` evaluates; guarantees as in `share`."""
    every = np.arange(len(sizes))
    return share(every, sizes, rank, world, micro_batch_tokens=batch_tokens, prompt_tokens=prompt_tokens)


def _longest_first(indices: np.ndarray, sizes: Sizes) -> np.ndarray:
    return indices[np.argsort(-sizes.longest[indices], kind="stable")]


def _cut(order: np.ndarray, sizes: Sizes, cap: int, prompt_tokens: int = 0) -> list[np.ndarray]:
    """Consecutive parts of `order` (longest first) with at most `cap` padded tokens each, as few as
    possible; an example that alone exceeds the cap is a part of its own."""
    rows_before = np.concatenate([[0], np.cumsum(sizes.rows[order])])
    cuts, start = [], 0
    while start < len(order):
        # longest first: the part's first example sets its row length
        rows = cap // (int(sizes.longest[order[start]]) + prompt_tokens)
        end = int(np.searchsorted(rows_before, rows_before[start] + rows, side="right")) - 1
        start = max(end, start + 1)
        cuts.append(start)
    return np.split(order, cuts)[:-1]


def _padded(parts: list[np.ndarray], sizes: Sizes, prompt_tokens: int) -> int:
    return sum(sizes.padded_tokens(part, prompt_tokens) for part in parts)


def _equal(order: np.ndarray, sizes: Sizes, places: int, cap: int, prompt_tokens: int) -> list[np.ndarray]:
    """As `_cut`, with the smallest cap that gives at most `places` parts: it makes their work as equal as whole
    examples allow."""
    low, high = 1, max(1, cap)
    while low < high:
        middle = (low + high) // 2
        if len(_cut(order, sizes, middle, prompt_tokens)) <= places:
            high = middle
        else:
            low = middle + 1
    return _cut(order, sizes, high, prompt_tokens)


def _fill(parts: list[np.ndarray], places: int) -> list[np.ndarray]:
    """Exactly `places` parts: the largest are halved where possible, then empty ones added."""
    while len(parts) < places:
        largest = max(range(len(parts)), key=lambda i: len(parts[i]), default=None)
        if largest is None or len(parts[largest]) < 2:
            return parts + [np.empty(0, dtype=np.int64)] * (places - len(parts))
        parts[largest : largest + 1] = np.array_split(parts[largest], 2)
    return parts
