"""Evaluation: the outputs of every example of a split, exactly once, for any number of ranks and lanes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gpc_dist.adapter.graft import GraftedEncoder
from gpc_dist.distributed.world import World
from gpc_dist.tasks import Encoded, LaneBatch, collate, evaluation_batches, merge_lanes
from gpc_dist.training.losses import split_outputs


def run_lanes(model: GraftedEncoder, batch: LaneBatch) -> list[Tensor]:
    """Outputs `[R_k, outputs]` of each lane's rows, for a batch on the model's device."""
    return model(batch.input_ids, batch.attention_mask, batch.token_type_ids, batch.lane_rows)


@torch.no_grad()
def all_outputs(
    model: GraftedEncoder,
    encoded: Encoded,
    pad_id: int,
    world: World,
    batch_tokens: int,
    on_batch: Callable[[], None] = lambda: None,
) -> list[list[np.ndarray]] | None:
    """Outputs of every lane for every example in the order of the split, on rank 0; None elsewhere.

    Args:
        batch_tokens: padded tokens, prompt included, of one batch of a rank, all lanes together.
        on_batch: called after each batch.
    """
    lanes = len(model.adapters)
    tokens = max(1, batch_tokens // lanes)
    found: list[tuple[int, list[np.ndarray]]] = []
    for indices in evaluation_batches(encoded.sizes, world.rank, world.size, tokens, model.prompt_tokens):
        # under ZeRO-3 a pass is a collective: a rank without examples runs one and drops the result
        batch = collate(encoded, indices if len(indices) else [0], pad_id)
        outputs = run_lanes(model, merge_lanes([batch] * lanes, pad_id).to(world.device))
        by_lane = [split_outputs(out, batch) for out in outputs]
        found += list(zip(indices.tolist(), map(list, zip(*by_lane, strict=True)), strict=False))
        on_batch()
    gathered = world.gather(found)
    if gathered is None:
        return None
    ordered = dict(pair for part in gathered for pair in part)
    total = sum(len(part) for part in gathered)
    if len(ordered) != len(encoded) or total != len(encoded):
        raise AssertionError(f"{total} outputs for {len(encoded)} examples")
    return [[ordered[index][lane] for index in range(len(encoded))] for lane in range(lanes)]
