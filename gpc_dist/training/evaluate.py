"""Evaluation: the outputs of every example of a split, exactly once, for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gpc_dist.adapter.graft import GraftedEncoder
from gpc_dist.engine.distributed import World
from gpc_dist.tasks import Batch, Encoded, collate, evaluation_batches
from gpc_dist.training.objective import split_outputs


def run_batch(model: GraftedEncoder, batch: Batch, device: torch.device) -> Tensor:
    """Outputs `[R, outputs]` of a batch's rows."""
    batch = batch.to(device)
    return model(batch.input_ids, batch.attention_mask, batch.token_type_ids)


@torch.no_grad()
def all_outputs(
    model: GraftedEncoder,
    encoded: Encoded,
    pad_id: int,
    world: World,
    batch_tokens: int,
    on_batch: Callable[[], None] = lambda: None,
) -> list[np.ndarray] | None:
    """Outputs of every example in the order of the split, on rank 0; None elsewhere.

    Args:
        batch_tokens: padded tokens, prompt included, of one batch of a rank.
        on_batch: called after each batch.
    """
    sizes, prompt = encoded.sizes, model.prompt_tokens
    found: list[tuple[int, np.ndarray]] = []
    for indices in evaluation_batches(sizes, world.rank, world.size, batch_tokens, prompt):
        # under ZeRO-3 a pass is a collective: a rank without examples runs one and drops the result
        batch = collate(encoded, indices if len(indices) else [0], pad_id)
        outputs = split_outputs(run_batch(model, batch, world.device), batch)
        found += list(zip(indices.tolist(), outputs, strict=False))
        on_batch()
    gathered = world.gather(found)
    if gathered is None:
        return None
    ordered = dict(pair for part in gathered for pair in part)
    total = sum(len(part) for part in gathered)
    if len(ordered) != len(encoded) or total != len(encoded):
        raise AssertionError(f"{total} outputs for {len(encoded)} examples")
    return [ordered[index] for index in range(len(encoded))]
