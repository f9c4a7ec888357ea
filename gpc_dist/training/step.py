"""One optimizer step: prepared, run by this rank, and finished by all ranks together.

A GPU is waited for in `finish` alone, which needs the step's loss and gradient norm on the host. So a
caller that prepares the next step between `backward` and `finish` does so while the GPU works.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpc_dist.engine.optimizer import LaneOptimizer, reduce_gradients, send_updates
from gpc_dist.tasks import Batch, Encoded, collate, share
from gpc_dist.training.evaluate import run_batch
from gpc_dist.training.objective import summed_loss
from gpc_dist.training.session import Session


@dataclass(frozen=True)
class MicroBatch:
    """Examples that a rank runs at once, on its device."""

    batch: Batch
    counts: bool
    """False for a pass that is run for the other ranks' sake only."""


@dataclass(frozen=True)
class Step:
    """The examples of a step, and this rank's part of them."""

    indices: np.ndarray
    """int64 `[B]`: the step's examples, over all ranks."""
    passes: list[MicroBatch]


@dataclass(frozen=True)
class Done:
    """What all ranks know of a finished step."""

    loss: float
    """Mean over the step's examples."""
    norm: float
    """Gradient norm before clipping."""
    finite: bool
    """Whether both are finite; the adapter is left as it was if they are not."""
    flags: float
    """Ranks that raised their flag."""


def prepare(session: Session, encoded: Encoded, indices: np.ndarray) -> Step:
    """The step of these examples. Copies to a GPU are queued, not waited for."""
    world = session.world
    parts = share(
        indices,
        encoded.sizes,
        world.rank,
        world.size,
        session.config.engine.micro_batch_tokens,
        session.model.prompt_tokens,
    )
    passes = []
    for part in parts:
        # under ZeRO-3 a pass is a collective: a rank without examples runs one that counts nothing
        batch = collate(encoded, part if len(part) else indices[-1:], session.pad_id)
        passes.append(MicroBatch(batch.to(world.device), counts=len(part) > 0))
    return Step(indices, passes)


def backward(session: Session, step: Step) -> Tensor:
    """Gradients of this rank's part of a step; returns its part of the step's mean loss, a scalar that a
    GPU may still be working on."""
    total = torch.zeros((), device=session.world.device)
    for micro in step.passes:
        outputs = run_batch(session.model, micro.batch, session.world.device)
        loss = summed_loss(session.task.kind, outputs, micro.batch) / len(step.indices)
        if not micro.counts:
            loss = loss * 0
        loss.backward()
        total += loss.detach()
    return total


def finish(session: Session, lane: LaneOptimizer, loss: Tensor, flag: bool = False) -> Done:
    """Sum the gradients over the ranks and update the adapter, unless something is not finite.

    Args:
        loss: what `backward` returned.
        flag: what this rank wants the others to know.
    """
    # filled by the device itself: a copy from the host would wait for all that is queued before it
    flags = torch.full_like(loss, float(flag))
    reduced = reduce_gradients([lane], torch.stack([loss, flags]), session.config.engine.zero_stage)
    mean_loss, raised = reduced.sums
    (norm,) = reduced.norms
    finite = math.isfinite(mean_loss) and math.isfinite(norm)
    if finite:
        lane.apply(norm)
        send_updates([lane])
    lane.clear()
    return Done(mean_loss, norm, finite, raised)
