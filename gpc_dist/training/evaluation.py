"""Evaluation: the outputs of every example of a split, exactly once, for any number of ranks and lanes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from gpc_dist.adapter.graft import shared_prompt_tokens
from gpc_dist.adapter.lane import Adapter
from gpc_dist.tasks import evaluation_batches
from gpc_dist.training.losses import split_outputs
from gpc_dist.training.session import Session, Split, lane_batch


@dataclass(frozen=True)
class Evaluation:
    """How well an adapter does on a split."""

    metrics: dict[str, float]
    """The task's metrics and the mean `loss`."""
    confusion: list[list[int]] | None
    """See `Task.confusion`."""


def evaluate(
    session: Session, lanes: Sequence[Adapter], split: Split, stop: Callable[[], bool]
) -> list[Evaluation] | None:
    """Evaluate the lanes on a split. Returns an evaluation for each lane, on every rank.

    Args:
        stop: asked after each batch whether this rank wants to stop; if any rank does, all return None.
    """
    task, world = session.task, session.world

    def check_stop() -> None:
        if world.any(stop()):
            raise _StopError

    try:
        outputs = all_outputs(session, lanes, split, check_stop)
    except _StopError:
        return None
    examples = split.examples
    found = [
        Evaluation(task.measure(examples, lane), task.confusion(examples, lane)) for lane in outputs or ()
    ]
    return [Evaluation(**each) for each in world.from_main([asdict(evaluation) for evaluation in found])]


class _StopError(Exception):
    """A rank requested a stop, and all ranks know."""


@torch.no_grad()
def all_outputs(
    session: Session, lanes: Sequence[Adapter], split: Split, on_batch: Callable[[], None] = lambda: None
) -> list[list[np.ndarray]] | None:
    """Compute the outputs of each lane for every example, in the split's order, on rank 0; None on other ranks.

    Args:
        on_batch: called after each batch.
    """
    world, pad_id, rows = session.world, session.pad_id, split.rows
    tokens = max(1, session.config.train.eval_batch_tokens // len(lanes))
    found: dict[int, np.ndarray] = {}
    for indices in evaluation_batches(
        rows.sizes, world.rank, world.size, tokens, shared_prompt_tokens(lanes)
    ):
        # under ZeRO-3 a pass is a collective: a rank without examples runs one and drops the result
        chosen = indices if len(indices) else np.array([0])
        batch = lane_batch([(split, chosen)] * len(lanes), pad_id)
        outputs = session.run(batch.to(world.device), lanes)
        by_lane = [split_outputs(out, own) for out, own in zip(outputs, batch.lanes, strict=True)]
        found.update(zip(indices.tolist(), map(np.stack, zip(*by_lane, strict=True)), strict=False))
        on_batch()
    gathered = world.gather_tensors(_packed(found, len(lanes)))
    if gathered is None:
        return None
    parts = [_unpacked(part) for part in gathered]
    ordered = {index: outputs for part in parts for index, outputs in part.items()}
    total = sum(map(len, parts))
    if len(ordered) != len(rows) or total != len(rows):
        raise AssertionError(f"{total} outputs for {len(rows)} examples")
    return [[ordered[index][lane] for index in range(len(rows))] for lane in range(len(lanes))]


def _packed(found: dict[int, np.ndarray], lanes: int) -> dict[str, Tensor]:
    """Outputs by index, `[K, outputs of the example]` each, as three tensors."""
    outputs = np.concatenate([np.empty((lanes, 0), np.float32), *found.values()], axis=1)
    return {
        "indices": torch.tensor(list(found), dtype=torch.int64),
        "sizes": torch.tensor([each.shape[1] for each in found.values()], dtype=torch.int64),
        "outputs": torch.from_numpy(outputs),
    }


def _unpacked(packed: dict[str, Tensor]) -> dict[int, np.ndarray]:
    """The reverse of `_packed`."""
    outputs = packed["outputs"].split(packed["sizes"].tolist(), dim=1)
    return dict(zip(packed["indices"].tolist(), (each.numpy() for each in outputs), strict=True))
