"""Schedules and the optimizer against plain re-computations."""

from __future__ import annotations

import copy
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from gpc_dist.adapter.lane import Adapter, EncoderShape
from gpc_dist.config import AdapterConfig, TrainConfig
from gpc_dist.distributed.optimizer import (
    LaneOptimizer,
    Reduced,
    parameter_groups,
    reduce_gradients,
    schedule_factor,
    send_updates,
)
from gpc_dist.distributed.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warm_up_rises_in_a_line(schedule: str) -> None:
    assert [schedule_factor(schedule, step, 4, 20) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]  # type: ignore[arg-type]


def test_schedules_after_warm_up() -> None:
    assert schedule_factor("constant", 19, 4, 20) == 1
    assert schedule_factor("linear", 12, 4, 20) == pytest.approx(0.5)
    assert schedule_factor("cosine", 12, 4, 20) == pytest.approx(0.5)
    assert schedule_factor("cosine", 8, 4, 20) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert schedule_factor("linear", 20, 4, 20) == 0
    assert schedule_factor("linear", 0, 0, 20) == 1


SEEDING = threading.Lock()
"""A seed is of the whole process."""


def adapter(seed: int = 0) -> Adapter:
    with SEEDING:
        return Adapter(AdapterConfig(prompt_tokens=3, cell="recurrent"), EncoderShape(3, 8, 8), 2, seed)


def test_clipping_and_adamw_are_plain_pytorchs() -> None:
    ours, plain = adapter(), adapter()
    config = TrainConfig(steps=1, lr=1e-2, cell_lr=3e-3, head_lr=5e-3, weight_decay=0.1, clip_norm=0.5)
    lane = LaneOptimizer(ours, config, ALONE, zero_stage=0)
    rates = {"prompt": 1e-2, "cell": 3e-3, "head": 5e-3}
    groups = [
        {"params": [p for n, p in plain.named_parameters() if n.startswith(part)], "lr": rate}
        for part, rate in rates.items()
    ]
    reference = torch.optim.AdamW(groups, weight_decay=0.1)
    for step in range(4):
        for module in (ours, plain):
            generator = torch.Generator().manual_seed(step)
            for parameter in module.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        reduced = reduce_gradients([lane], torch.zeros(1), 0)
        lane.apply(reduced.norms[0])
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        reference.step()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_lanes_have_norms_and_fates_of_their_own() -> None:
    first, second = adapter(0), adapter(1)
    config = TrainConfig(steps=1)
    lanes = [LaneOptimizer(lane, config, ALONE, 0) for lane in (first, second)]
    for parameter in first.parameters():
        parameter.grad = torch.ones_like(parameter)
    for parameter in second.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    reduced = reduce_gradients(lanes, torch.tensor([1.0, 2.0]), 0)
    assert reduced.sums == [1.0, 2.0]
    assert reduced.norms[0] == pytest.approx(math.sqrt(sum(p.numel() for p in first.parameters())))
    assert math.isnan(reduced.norms[1])


class Meeting:
    """Where ranks that are threads lay down what the others take."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size, timeout=30)
        self.board: list[Any] = [None] * size


@dataclass(frozen=True)
class ThreadWorld(World):
    """A rank that is a thread of this process."""

    meeting: Meeting

    def exchange(self, value: Any) -> list[Any]:
        self.meeting.board[self.rank] = value
        self.meeting.barrier.wait()
        values = list(self.meeting.board)
        self.meeting.barrier.wait()
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self.exchange(tensor.clone())).sum(0))

    def sum_to(self, tensor: Tensor, rank: int) -> None:
        total = torch.stack(self.exchange(tensor.clone())).sum(0)
        tensor.copy_(total if rank == self.rank else torch.full_like(total, torch.nan))

    def copy_from(self, tensor: Tensor, rank: int) -> None:
        tensor.copy_(self.exchange(tensor.clone())[rank])

    def gather_tensors(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]] | None:
        values = self.exchange(tensors)
        return values if self.is_main else None


def on_ranks(size: int, work: Callable[[World], Any]) -> list[Any]:
    """What `work` gives on every rank."""
    meeting = Meeting(size)

    def run(rank: int) -> Any:
        try:
            return work(ThreadWorld(rank, size, rank, torch.device("cpu"), meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def drawn(parameters: Sequence[Tensor], *seed: int) -> list[Tensor]:
    number = sum(n * 100**place for place, n in enumerate(seed))
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(p.shape, generator=generator) for p in parameters]


def lanes_of(
    configs: list[TrainConfig], world: World, stage: int
) -> tuple[list[Adapter], list[LaneOptimizer]]:
    made = [adapter(seed) for seed in range(len(configs))]
    return made, [LaneOptimizer(a, c, world, stage) for a, c in zip(made, configs, strict=True)]


def step_of(
    lanes: Sequence[LaneOptimizer], gradients: list[list[Tensor] | None], stage: int, share: float = 1.0
) -> Reduced:
    """One step of all lanes from this rank's gradients; a rank without rows of a lane has none for it."""
    for lane, own in zip(lanes, gradients, strict=True):
        lane.clear()
        if own is not None:
            for parameter, gradient in zip(lane.named.values(), own, strict=True):
                parameter.grad = gradient
    world = lanes[0].world
    reduced = reduce_gradients(lanes, torch.tensor([1.0, 10.0 * world.rank]), stage)
    for lane, norm in zip(lanes, reduced.norms, strict=True):
        lane.set_factor(share)
        lane.apply(norm)
    send_updates(lanes)
    return reduced


ARRANGEMENTS = [(1, 0), (1, 2), (2, 0), (2, 1), (3, 2), (2, 3), (8, 1), (8, 2)]
"""Ranks and ZeRO stage; an adapter has six tensors, so that of eight ranks some own none."""
LANES = [
    TrainConfig(
        steps=1, lr=1e-2, cell_lr=3e-3, head_lr=5e-3, weight_decay=0.1, betas=(0.8, 0.95), clip_norm=0.5
    ),
    TrainConfig(steps=1, lr=2e-2, cell_lr=1e-3, weight_decay=0.0, clip_norm=None),
    TrainConfig(steps=1, clip_norm=1e3),
]
RATE_SHARES = [0.5, 1.0, 0.25]


@pytest.mark.parametrize(("ranks", "stage"), ARRANGEMENTS)
def test_on_any_ranks_and_stage_a_lane_is_trained_as_by_plain_adamw(ranks: int, stage: int) -> None:
    def work(world: World) -> tuple[list[Adapter], list[Reduced]]:
        adapters, lanes = lanes_of(LANES, world, stage)
        steps = []
        for step, share in enumerate(RATE_SHARES):
            own: list[list[Tensor] | None] = [
                drawn(list(a.parameters()), step, world.rank, k) for k, a in enumerate(adapters)
            ]
            if world.rank == 1:
                own[1] = None
            steps.append(step_of(lanes, own, stage, share))
        return adapters, steps

    found = on_ranks(ranks, work)
    for k, config in enumerate(LANES):
        plain = adapter(k)
        rates = {"prompt": config.lr, "cell": config.cell_lr, "head": config.head_lr or config.lr}
        groups = [
            {"params": [p for n, p in plain.named_parameters() if n.startswith(part)], "lr": rate}
            for part, rate in rates.items()
        ]
        reference = torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)
        parameters = list(plain.parameters())
        for step, share in enumerate(RATE_SHARES):
            parts = [drawn(parameters, step, r, k) for r in range(ranks) if (r, k) != (1, 1)]
            for parameter, gradients in zip(parameters, zip(*parts, strict=True), strict=True):
                parameter.grad = torch.stack(gradients).sum(0)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)
            for _, steps in found:
                assert steps[step].norms[k] == pytest.approx(norm.item(), rel=1e-5)
            for group, rate in zip(reference.param_groups, rates.values(), strict=True):
                group["lr"] = share * rate
            reference.step()
        for adapters, _ in found:
            for mine, theirs in zip(adapters[k].parameters(), parameters, strict=True):
                torch.testing.assert_close(mine, theirs)
    for _, steps in found:
        assert [reduced.sums for reduced in steps] == [[ranks, 5.0 * ranks * (ranks - 1)]] * len(RATE_SHARES)


def test_the_mlp_that_makes_prompts_has_a_rate_of_its_own() -> None:
    config = AdapterConfig(method="deep-prompt", prompt_tokens=2, prompt_mlp=4)
    named = dict(Adapter(config, EncoderShape(3, 8, 8), 2).named_parameters())
    rates = {
        id(parameter): group["lr"]
        for group in parameter_groups(named, TrainConfig(steps=1, lr=0.1, mlp_lr=0.02, head_lr=0.3))
        for parameter in group["params"]
    }
    assert {name: rates[id(parameter)] for name, parameter in named.items()} == {
        "prompt.start": 0.1,
        "prompt.deep": 0.1,
        "prompt.mlp.0.weight": 0.02,
        "prompt.mlp.0.bias": 0.02,
        "prompt.mlp.2.weight": 0.02,
        "prompt.mlp.2.bias": 0.02,
        "head.linear.weight": 0.3,
        "head.linear.bias": 0.3,
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_optimizer_state_and_from_stage_2_on_gradients_have_one_owner(stage: int) -> None:
    def work(world: World) -> tuple[set[str], set[str]]:
        (made,), lanes = lanes_of(LANES[:1], world, stage)
        step_of(lanes, [drawn(list(made.parameters()), world.rank)], stage)
        inner = lanes[0].inner
        assert inner is not None
        assert all(group["params"] for group in inner.param_groups)
        named = lanes[0].named.items()
        return {n for n, p in named if p in inner.state}, {n for n, p in named if p.grad is not None}

    # the largest first, each to the rank that has least: 64 + 16 + 8 and 64 + 24 + 2 numbers
    parts = [
        {"cell.0.forget.0.weight", "prompt.start", "head.linear.bias"},
        {"cell.0.remember.0.weight", "head.linear.weight", "cell.0.bias"},
    ]
    every = parts[0] | parts[1]
    states, gradients = zip(*on_ranks(2, work), strict=True)
    assert list(states) == ([every, every] if stage == 0 else parts)
    assert list(gradients) == (parts if stage == 2 else [every, every])


def adafactor(
    parameters: list[Tensor], gradients: list[list[Tensor]], rates: list[float], decay: float
) -> None:
    """Shazeer and Stern 2018, algorithms 4 to 6, without momentum and without scaling by the parameters."""
    for parameter, steps, rate in zip(parameters, gradients, rates, strict=True):
        rows = columns = whole = torch.zeros(())
        for number, gradient in enumerate(steps, 1):
            keep = 1 - number**-0.8
            square = gradient.square() + 1e-30
            if gradient.dim() == 2:
                rows = keep * rows + (1 - keep) * square.mean(1)
                columns = keep * columns + (1 - keep) * square.mean(0)
                whole = torch.outer(rows, columns) / rows.mean()
            else:
                whole = keep * whole + (1 - keep) * square
            update = gradient / whole.sqrt()
            update /= update.square().mean().sqrt().clamp(min=1)
            parameter -= rate * decay * parameter + rate * update


def test_adafactor_is_that_of_its_paper_with_a_given_rate() -> None:
    config = TrainConfig(
        steps=1, optimizer="adafactor", lr=0.3, cell_lr=0.1, weight_decay=0.01, clip_norm=None
    )
    (made,), lanes = lanes_of([config], ALONE, 0)
    assert lanes[0].factor == 1.0
    names, start = zip(*((n, p.detach().clone()) for n, p in made.named_parameters()), strict=True)
    steps = [drawn(start, step) for step in range(4)]
    for gradients in steps:
        step_of(lanes, [[0.01 * g for g in gradients]], 0)
    rates = [0.1 if name.startswith("cell") else 0.3 for name in names]
    adafactor(list(start), [[0.01 * g for g in own] for own in zip(*steps, strict=True)], rates, 0.01)
    for mine, theirs in zip(made.parameters(), start, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, 0), (1, 0)),
        ((2, 1), (2, 1)),
        ((1, 0), (3, 2)),
        ((3, 2), (1, 0)),
        ((8, 1), (2, 2)),
        ((2, 0), (8, 3)),
    ],
)
def test_training_goes_on_bit_for_bit_on_any_ranks_and_stage(
    before: tuple[int, int], after: tuple[int, int], optimizer: Any
) -> None:
    config = TrainConfig(steps=1, optimizer=optimizer, clip_norm=None)

    def take_steps(lane: LaneOptimizer, numbers: list[int], stage: int) -> None:
        for number in numbers:  # all gradients are of one rank, so that their sum is exact
            own = drawn(list(lane.named.values()), number) if lane.world.is_main else None
            step_of([lane], [own], stage)

    def undisturbed(world: World) -> tuple[dict[str, Tensor], Adapter]:
        (made,), (lane,) = lanes_of([config], world, before[1])
        take_steps(lane, [0, 1], before[1])
        taken = lane.state()
        take_steps(lane, [2, 3], before[1])
        return taken, made

    found = on_ranks(before[0], undisturbed)
    taken, expected = found[0]
    assert all(state == {} for state, _ in found[1:])
    assert all(f"param/{name}" in taken for name, _ in expected.named_parameters())
    kept = copy.deepcopy(taken)

    def resumed(world: World) -> tuple[Adapter, set[str], dict[str, Tensor]]:
        made = adapter(seed=5)
        lane = LaneOptimizer(made, config, world, after[1])
        lane.load(taken)
        held = {n for n, p in lane.named.items() if lane.inner and p in lane.inner.state}
        again = lane.state()
        take_steps(lane, [2, 3], after[1])
        return made, held, again

    every = expected.state_dict().keys()
    ranks = on_ranks(after[0], resumed)
    for made, _, _ in ranks:
        for name, parameter in made.named_parameters():
            assert torch.equal(parameter, expected.get_parameter(name)), name
    holders = after[0] if after[1] == 0 else 1
    assert Counter(name for _, held, _ in ranks for name in held) == dict.fromkeys(every, holders)
    assert ranks[0][2].keys() == kept.keys()
    for key, value in kept.items():
        assert torch.equal(taken[key], value), key
        assert torch.equal(ranks[0][2][key], value), key
