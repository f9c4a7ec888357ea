"""Token ids of all examples, from which batches are made.

Rows share segments: a ReCoRD passage stands before every entity, a MultiRC paragraph before every
answer. So each distinct segment is tokenised and stored once, and a row refers to its one or two
segments and says how many tokens of each it keeps. Reading MultiRC is about ten times faster than
tokenising its rows, and ReCoRD takes a few hundred MiB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from gpc_dist.errors import UserError
from gpc_dist.tasks.batching import Sizes
from gpc_dist.tasks.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts per call of the tokenizer: enough to keep it busy, few enough to bound its Python lists.
_CHUNK = 1000

Frame = tuple[tuple[int | None, int], ...]
"""Layout of a row: `(token id, token type)` of each special token in order, and
`(None, token type)` where a segment stands. BERT's pair: [CLS] segment [SEP] segment [SEP]."""


@dataclass(frozen=True)
class Encoded:
    """N examples with R rows in all, made of U distinct segments with S tokens in all."""

    segment_ids: np.ndarray
    """int32 `[S]`: token ids of the segments, one after the other."""
    segment_starts: np.ndarray
    """int64 `[U + 1]`: where each segment starts in `segment_ids`."""
    row_segments: np.ndarray
    """int64 `[R, 1 or 2]`: the row's segments."""
    row_kept: np.ndarray
    """int64 `[R, 1 or 2]`: tokens of each that the row keeps, from the segment's start."""
    frame: Frame
    """The special tokens of every row."""
    has_token_types: bool
    """Whether the tokenizer makes token type ids."""
    example_starts: np.ndarray
    """int64 `[N + 1]`: where each example's rows start."""
    targets: np.ndarray | None
    """Classification: int64 `[N]`; regression: float32 `[N]`; choice: bool `[R]`, true for right
    candidates; None if an example is unlabelled."""

    def __len__(self) -> int:
        return len(self.example_starts) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every row, special tokens included, int64 `[R]`."""
        return self.row_kept.sum(axis=1) + sum(token is not None for token, _ in self.frame)

    def rows_of(self, indices: np.ndarray) -> np.ndarray:
        """Numbers of the rows of these examples, in their order, int64."""
        return ranges(self.example_starts[indices], self.sizes.rows[indices])

    def with_rows_of(self, tokens: int) -> Encoded:
        """The same examples, with so many tokens in each row: for what is computed of a row as a whole."""
        rows = len(self.row_kept)
        return replace(
            self,
            segment_ids=np.zeros(tokens, dtype=np.int32),
            segment_starts=np.array([0, tokens]),
            row_segments=np.zeros((rows, 1), dtype=np.int64),
            row_kept=np.full((rows, 1), tokens),
            frame=((None, 0),),
            has_token_types=False,
        )

    def digest(self) -> str:
        """SHA-256 of the token ids and types of all rows."""
        found = hashlib.sha256(repr((self.frame, self.has_token_types)).encode())
        for part in (self.segment_ids, self.segment_starts, self.row_segments, self.row_kept):
            found.update(f"{part.dtype} {part.shape}".encode())
            found.update(np.ascontiguousarray(part).tobytes())
        return found.hexdigest()

    @cached_property
    def sizes(self) -> Sizes:
        """The sizes of the examples, for batching."""
        longest = np.maximum.reduceat(self.lengths, self.example_starts[:-1])
        return Sizes(rows=np.diff(self.example_starts), longest=longest)


def one_text(ids: np.ndarray) -> Encoded:
    """One unlabelled example with one row of these token ids, int `[T]`."""
    return Encoded(
        segment_ids=ids.astype(np.int32),
        segment_starts=np.array([0, len(ids)]),
        row_segments=np.zeros((1, 1), dtype=np.int64),
        row_kept=np.array([[len(ids)]]),
        frame=((None, 0),),
        has_token_types=False,
        example_starts=np.array([0, 1]),
        targets=None,
    )


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Tokenise examples of one task.

    Args:
        examples: at least one; all rows have a second segment, or none has.
        tokenizer: a tokenizer of transformers; a row gets the special tokens that it puts around
            one or two segments.
        max_length: most tokens of a row, special tokens included. A row that is longer loses the
            end of its longer segment (`longest_first`), so a question keeps its words beside a long
            passage.

    Raises:
        UserError: `max_length` leaves no room beside the special tokens.
    """
    rows = [tuple(text for text in row if text is not None) for example in examples for row in example.rows]
    frame, has_token_types = _probe(tokenizer, segments=len(rows[0]))
    room = max_length - sum(token is not None for token, _ in frame)
    if room < len(rows[0]):
        raise UserError(f"data.max_length {max_length} leaves no room for text: raise it")

    numbers = {text: number for number, text in enumerate(dict.fromkeys(chain(*rows)))}
    segment_ids, segment_lengths = _tokenize(list(numbers), tokenizer, room)
    row_segments = np.array([[numbers[text] for text in row] for row in rows], dtype=np.int64)
    return Encoded(
        segment_ids=segment_ids,
        segment_starts=_starts(np.minimum(segment_lengths, room)),
        row_segments=row_segments,
        row_kept=_longest_first(segment_lengths[row_segments], room),
        frame=frame,
        has_token_types=has_token_types,
        example_starts=_starts(np.array([len(example.rows) for example in examples])),
        targets=_targets(examples),
    )


def _probe(tokenizer: PreTrainedTokenizerBase, segments: int) -> tuple[Frame, bool]:
    """The frame of a row of `segments` segments, found by tokenising one; whether it has token types."""
    word = "a"
    output = tokenizer(*[word] * segments, return_special_tokens_mask=True)
    width = len(tokenizer(word, add_special_tokens=False)["input_ids"])
    types = output.get("token_type_ids") or [0] * len(output["input_ids"])
    frame: list[tuple[int | None, int]] = []
    position = 0
    while position < len(output["input_ids"]):
        is_special = output["special_tokens_mask"][position]
        frame.append((output["input_ids"][position] if is_special else None, types[position]))
        position += 1 if is_special else width
    return tuple(frame), "token_type_ids" in output


def _tokenize(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first `most` token ids of each text, int32 `[S]`, and the full length of each, int64 `[U]`."""
    ids: list[np.ndarray] = []
    lengths: list[int] = []
    for start in range(0, len(texts), _CHUNK):
        lists = tokenizer(
            texts[start : start + _CHUNK],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about texts that are longer than the encoder's positions
        )["input_ids"]
        cut = chain.from_iterable(tokens[:most] for tokens in lists)
        ids.append(np.fromiter(cut, dtype=np.int32))
        lengths += [len(tokens) for tokens in lists]
    return np.concatenate(ids), np.array(lengths, dtype=np.int64)


def _longest_first(lengths: np.ndarray, room: int) -> np.ndarray:
    """Tokens that each segment keeps in a row with room for `room` of them; `[R, 1 or 2]` as `lengths`.

    The rule of the tokenizers library: the shorter segment stays whole up to half of the room, the
    longer one (the second of two equals) takes what is left.
    """
    if lengths.shape[1] == 1:
        return np.minimum(lengths, room)
    shorter = np.minimum(lengths.min(axis=1), room // 2)
    longer = np.minimum(lengths.max(axis=1), room - shorter)
    first_is_longer = lengths[:, 0] > lengths[:, 1]
    return np.stack(
        [np.where(first_is_longer, longer, shorter), np.where(first_is_longer, shorter, longer)],
        axis=1,
    )


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The ranges `starts[i], ..., starts[i] + counts[i] - 1`, one after the other."""
    offsets = starts - np.concatenate([[0], np.cumsum(counts)[:-1]])[: len(starts)]
    return np.repeat(offsets, counts) + np.arange(counts.sum())


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _targets(examples: Sequence[Example]) -> np.ndarray | None:
    targets = [example.target for example in examples]
    if any(target is None for target in targets):
        return None
    if isinstance(targets[0], tuple):
        right = [(example.target, len(example.rows)) for example in examples]
        return np.array([i in target for target, rows in right for i in range(rows)])  # type: ignore[operator]
    return np.array(targets, dtype=np.float32 if isinstance(targets[0], float) else np.int64)
