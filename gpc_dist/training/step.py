"""One optimizer step of one or more lanes: prepared, run by this rank, and finished by all ranks together.

All lanes of a step share its passes: one batch holds the rows of all lanes, whatever their tasks. Each lane has its own
loss, gradient norm, clipping and update, so it learns as it would alone, up to the order of sums.

Only `finish` waits for a GPU, because it needs the losses and gradient norms on the host. So a caller can prepare
the next step between `backward` and `finish`, while the GPU works.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpc_dist.adapter.graft import shared_prompt_tokens
from gpc_dist.adapter.lane import Adapter
from gpc_dist.config import Config
from gpc_dist.distributed import deepspeed_config
from gpc_dist.distributed.optimizer import LaneOptimizer, reduce_gradients, send_updates
from gpc_dist.distributed.zero_optimizer import Optimizer, ZeroOptimizer
from gpc_dist.tasks import LaneBatch, Sizes, share
from gpc_dist.tasks.example import Kind
from gpc_dist.training.losses import summed_loss
from gpc_dist.training.session import Session, Split, lane_batch

PASS_TOKENS = 50
"""Padded tokens of a rank that an additional pass must save, on a CPU. Such a pass takes the time of up to 40 of them
(MiniLM's shape, 1 and 8 lanes). A GPU needs few and large passes, and under ZeRO-3 each pass gathers the encoder."""


def optimizer_of(adapter: Adapter, session: Session, config: Config) -> Optimizer:
    """The optimizer of a run: DeepSpeed's, where the encoder is trained and something of it is partitioned.

    Raises:
        MachineError: see `ZeroOptimizer`.
    """
    world = session.world
    if deepspeed_config.trains(config, world.size):
        return ZeroOptimizer(adapter, session.model, config.train, world, session.ds_config)
    return LaneOptimizer(adapter, config.train, world, config.engine.zero_stage)


@dataclass(frozen=True)
class LaneExamples:
    """An adapter and its examples of a step."""

    adapter: Adapter
    split: Split
    indices: np.ndarray
    """int64 `[B]`: the lane's examples, over all ranks."""
    kind: Kind
    """Of the lane's task."""
    class_weights: Tensor | None = None
    """float32 `[C]`, on the rank's device, see `summed_loss`."""

    @property
    def work(self) -> int:
        """Tokens that it gives passes to do, prompt included: what lanes share a pass by."""
        sizes = self.split.rows.sizes
        tokens = sizes.rows * (sizes.longest + self.adapter.prompt_tokens)
        return int(tokens[self.indices].sum())


@dataclass(frozen=True)
class MicroBatch:
    """Examples that a rank runs in one pass, on its device."""

    batch: LaneBatch
    counts: bool
    """False for a pass that this rank runs only because the other ranks run one."""


@dataclass(frozen=True)
class Step:
    """The examples of all lanes in a step, and this rank's passes."""

    lanes: list[LaneExamples]
    """One entry for each lane, in order."""
    passes: list[MicroBatch]


@dataclass(frozen=True)
class Done:
    """Result of a step for one lane, the same on all ranks."""

    loss: float
    """Mean over the lane's examples, with their class weights."""
    norm: float
    """Gradient norm before clipping."""

    @property
    def finite(self) -> bool:
        """Whether loss and norm are finite; if not, the adapter is not updated."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def prepare(session: Session, lanes: Sequence[LaneExamples]) -> Step:
    """Prepare a step of these lanes and examples. Copies to a GPU are asynchronous.

    The examples of all lanes are divided together over ranks and passes, so that a pass has rows of similar length,
    whatever their lanes.
    """
    world = session.world
    sizes = Sizes(
        np.concatenate([lane.split.rows.sizes.rows[lane.indices] for lane in lanes]),
        np.concatenate([lane.split.rows.sizes.longest[lane.indices] for lane in lanes]),
    )
    ends = np.cumsum([len(lane.indices) for lane in lanes])
    parts = share(
        np.arange(len(sizes)),
        sizes,
        world.rank,
        world.size,
        micro_batch_tokens=session.config.engine.micro_batch_tokens,
        prompt_tokens=shared_prompt_tokens([lane.adapter for lane in lanes]),
        pass_tokens=PASS_TOKENS
        if world.device.type == "cpu" and session.config.engine.zero_stage < 3
        else None,
    )
    passes = []
    for part in parts:
        # under ZeRO-3 a pass is a collective: a rank without examples runs one that does not count
        chosen = part if len(part) else np.array([len(sizes) - 1])
        own = []
        for lane, end in zip(lanes, ends, strict=True):
            places = chosen - (end - len(lane.indices))  # among the lane's own examples
            own.append((lane.split, lane.indices[places[(places >= 0) & (places < len(lane.indices))]]))
        batch = lane_batch(own, session.pad_id).to(world.device)
        passes.append(MicroBatch(batch, counts=len(part) > 0))
    return Step(list(lanes), passes)


def backward(session: Session, optimizers: Sequence[Optimizer], step: Step) -> Tensor:
    """Compute the gradients of this rank's part of a step. Returns its part of each lane's mean loss, float32 `[K]`,
    without waiting for the GPU."""
    total = torch.zeros(len(step.lanes), device=session.world.device)
    first = optimizers[0]  # what runs passes, all lanes have in common
    for number, micro in enumerate(step.passes, 1):
        outputs = session.run(micro.batch, [lane.adapter for lane in step.lanes], first.engine)
        losses = torch.stack(
            [
                summed_loss(lane.kind, out, batch, lane.class_weights) / len(lane.indices)
                if len(out)
                else out.sum()
                for out, batch, lane in zip(outputs, micro.batch.lanes, step.lanes, strict=True)
            ]
        )
        if not micro.counts:
            losses = losses * 0
        first.backward(losses.sum(), last=number == len(step.passes))
        total += losses.detach()
    return total


def finish(
    session: Session, optimizers: Sequence[Optimizer], losses: Tensor, flag: bool = False
) -> tuple[list[Done], bool]:
    """Sum the gradients over the ranks, and update each adapter whose loss and gradient norm are finite.

    Args:
        losses: what `backward` returned.
        flag: of this rank, combined with those of the other ranks.

    Returns:
        The result of each lane, and whether any rank set its flag.
    """
    # filled on the device: a copy from the host would wait for all work queued before it
    numbers = torch.cat([losses, torch.full_like(losses[:1], float(flag))])
    if isinstance(optimizers[0], ZeroOptimizer):
        reduced = optimizers[0].step(numbers)
    else:
        reduced = reduce_gradients(_lanes(optimizers), numbers, session.config.engine.zero_stage)
    *means, raised = reduced.sums
    done = [Done(*found) for found in zip(means, reduced.norms, strict=True)]
    finite = [(lane, one) for lane, one in zip(_lanes(optimizers), done, strict=False) if one.finite]
    for lane, one in finite:
        lane.apply(one.norm)
    send_updates([lane for lane, _ in finite])
    for lane in _lanes(optimizers):
        lane.clear()
    return done, raised > 0


def _lanes(optimizers: Sequence[Optimizer]) -> list[LaneOptimizer]:
    """Those whose updates are made here, which are all or none: DeepSpeed makes its own."""
    return [each for each in optimizers if isinstance(each, LaneOptimizer)]
