"""From encoded examples to the padded tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from gpc_dist.tasks.encode import Encoded

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """B examples in R rows (R = B unless the task is a choice), padded on the right to the longest
    row, T. The rows of an example stand together."""

    input_ids: torch.Tensor
    """int64 `[R, T]`."""
    attention_mask: torch.Tensor
    """int64 `[R, T]`: 1 for tokens, 0 for padding."""
    token_type_ids: torch.Tensor | None
    """int64 `[R, T]`, for tokenizers that make them."""
    rows_per_example: list[int]
    """`[B]`, summing to R."""
    targets: torch.Tensor | None
    """Classification: int64 `[B]`; regression: float32 `[B]`; choice: bool `[R]`, true for right
    candidates; None: unlabelled."""
    indices: np.ndarray
    """int64 `[B]`: numbers of the examples in their split."""
    tokens: int
    """Tokens that are not padding; counted here because a GPU tensor's sum would wait for it."""

    @property
    def padded_tokens(self) -> int:
        """Tokens with padding, R x T."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`. A copy to a GPU is queued, through pinned memory, and not
        waited for."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_cuda or device.type != "cuda":
                return tensor.to(device)
            return tensor.pin_memory().to(device, non_blocking=True)

        return replace(
            self,
            input_ids=move(self.input_ids),
            attention_mask=move(self.attention_mask),
            token_type_ids=None if self.token_type_ids is None else move(self.token_type_ids),
            targets=None if self.targets is None else move(self.targets),
        )


def collate(encoded: Encoded, indices: Sequence[int] | np.ndarray, pad_id: int) -> Batch:
    """The batch of these examples, in this order; none give a batch of zero rows."""
    import torch

    chosen = np.asarray(indices, dtype=np.int64)
    counts = encoded.sizes.rows[chosen]
    rows = _ranges(encoded.example_starts[chosen], counts)
    lengths = encoded.lengths[rows]
    width = int(lengths.max(initial=0))
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    token_types = np.zeros_like(input_ids)
    _fill_rows(encoded, rows, input_ids, token_types)
    targets = encoded.targets
    if targets is not None:
        targets = targets[rows if targets.dtype == np.bool_ else chosen]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64)),
        token_type_ids=torch.from_numpy(token_types) if encoded.has_token_types else None,
        rows_per_example=counts.tolist(),
        targets=None if targets is None else torch.from_numpy(targets),
        indices=chosen,
        tokens=int(lengths.sum()),
    )


def _fill_rows(encoded: Encoded, rows: np.ndarray, input_ids: np.ndarray, token_types: np.ndarray) -> None:
    """Writes the rows into `[R, T]` tables, one piece of the frame at a time for all rows."""
    flat_ids, flat_types = input_ids.reshape(-1), token_types.reshape(-1)
    cursor = np.arange(len(rows)) * input_ids.shape[1]
    columns = iter(range(encoded.row_segments.shape[1]))
    for token, token_type in encoded.frame:
        if token is None:
            column = next(columns)
            kept = encoded.row_kept[rows, column]
            starts = encoded.segment_starts[encoded.row_segments[rows, column]]
            places = _ranges(cursor, kept)
            flat_ids[places] = encoded.segment_ids[_ranges(starts, kept)]
        else:
            kept = np.ones_like(cursor)
            places = cursor
            flat_ids[places] = token
        flat_types[places] = token_type
        cursor = cursor + kept


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`starts[0], starts[0] + 1, ...` (`counts[0]` of them), then the same of the next start."""
    offsets = starts - np.concatenate([[0], np.cumsum(counts)[:-1]])[: len(starts)]
    return np.repeat(offsets, counts) + np.arange(counts.sum())
