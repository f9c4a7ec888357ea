"""From encoded examples to the padded tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from gpc_dist.tasks.encode import Encoded, ranges

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
    """Tokens that are not padding; counted here, because reading a sum from a GPU would wait for it."""

    @property
    def padded_tokens(self) -> int:
        """Tokens with padding, R x T."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`. Copies to a GPU are asynchronous, from pinned memory."""
        return replace(
            self,
            input_ids=to_device(self.input_ids, device),
            attention_mask=to_device(self.attention_mask, device),
            token_type_ids=None if self.token_type_ids is None else to_device(self.token_type_ids, device),
            targets=None if self.targets is None else to_device(self.targets, device),
        )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`; see `Batch.to`."""
    if tensor.is_cuda or device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def collate(encoded: Encoded, indices: Sequence[int] | np.ndarray, pad_id: int) -> Batch:
    """The batch of these examples, in this order; without examples a batch of zero rows."""
    import torch

    chosen = np.asarray(indices, dtype=np.int64)
    counts = encoded.sizes.rows[chosen]
    rows = encoded.rows_of(chosen)
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


@dataclass(frozen=True)
class LaneBatch:
    """Batches of several lanes as one: the rows of the first lane, then those of the second, and so on."""

    input_ids: torch.Tensor
    """int64 `[R, T]`."""
    attention_mask: torch.Tensor
    """int64 `[R, T]`."""
    token_type_ids: torch.Tensor | None
    """int64 `[R, T]`."""
    lanes: list[Batch]
    """The batch of each lane, which may have no rows; `to` moves only its targets."""
    text_states: torch.Tensor | None = None
    """`[R, T, H]`: the states of the rows that enter the first layer that a pass runs, if it is not the encoder's."""

    @property
    def lane_rows(self) -> list[int]:
        """Rows of each lane, summing to R."""
        return [len(batch.input_ids) for batch in self.lanes]

    @property
    def padded_tokens(self) -> int:
        """Tokens with padding, R x T."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> LaneBatch:
        """As `Batch.to`."""
        return LaneBatch(
            to_device(self.input_ids, device),
            to_device(self.attention_mask, device),
            None if self.token_type_ids is None else to_device(self.token_type_ids, device),
            [
                replace(batch, targets=None if batch.targets is None else to_device(batch.targets, device))
                for batch in self.lanes
            ],
            None if self.text_states is None else to_device(self.text_states, device),
        )


def merge_lanes(batches: Sequence[Batch], pad_id: int) -> LaneBatch:
    """One batch of the lanes' batches, padded to the longest row of all."""
    import torch

    width = max(batch.input_ids.shape[1] for batch in batches)

    def stack(tables: Sequence[torch.Tensor], padding: int) -> torch.Tensor:
        return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1]), value=padding) for t in tables])

    token_types = [batch.token_type_ids for batch in batches if batch.token_type_ids is not None]
    return LaneBatch(
        stack([batch.input_ids for batch in batches], pad_id),
        stack([batch.attention_mask for batch in batches], 0),
        stack(token_types, 0) if token_types else None,
        list(batches),
    )


def _fill_rows(encoded: Encoded, rows: np.ndarray, input_ids: np.ndarray, token_types: np.ndarray) -> None:
    """Write the rows into int64 `[R, T]` arrays: for each element of the frame, all rows at once."""
    flat_ids, flat_types = input_ids.reshape(-1), token_types.reshape(-1)
    cursor = np.arange(len(rows)) * input_ids.shape[1]
    columns = iter(range(encoded.row_segments.shape[1]))
    for token, token_type in encoded.frame:
        if token is None:
            column = next(columns)
            kept = encoded.row_kept[rows, column]
            starts = encoded.segment_starts[encoded.row_segments[rows, column]]
            places = ranges(cursor, kept)
            flat_ids[places] = encoded.segment_ids[ranges(starts, kept)]
        else:
            kept = np.ones_like(cursor)
            places = cursor
            flat_ids[places] = token
        flat_types[places] = token_type
        cursor = cursor + kept
