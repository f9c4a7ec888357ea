"""Batches hold what the tokenizer itself makes of the rows, whatever is shared or cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gpc_dist.errors import UserError
from gpc_dist.tasks import Example, collate, encode

WORDS = ["the", "keeper", "counted", "every", "ship", "before", "fog", "came", "into", "harbour,"]


def random_texts(seed: int, count: int) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, 30))) for _ in range(count)]


@pytest.mark.parametrize("max_length", [12, 13, 24, 200])
@pytest.mark.parametrize("paired", [False, True])
def test_batches_equal_the_tokenizers_own(tokenizer: Any, max_length: int, paired: bool) -> None:
    first, second = random_texts(0, 40), random_texts(1, 40)
    examples = [
        Example(n, ((a, b if paired else None),), target=n % 2)
        for n, (a, b) in enumerate(zip(first, second, strict=True))
    ]
    expected = tokenizer(
        first,
        second if paired else None,
        truncation="longest_first",
        max_length=max_length,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    encoded = encode(examples, tokenizer, max_length)
    batch = collate(encoded, range(40), tokenizer.pad_token_id)
    assert torch.equal(batch.input_ids, expected["input_ids"])
    assert torch.equal(batch.attention_mask, expected["attention_mask"])
    assert (batch.token_type_ids is None) == ("token_type_ids" not in expected)
    if batch.token_type_ids is not None:
        assert torch.equal(batch.token_type_ids, expected["token_type_ids"])
    assert np.array_equal(encoded.lengths, expected["attention_mask"].sum(1).numpy())
    assert encoded.lengths.max() <= max_length


def test_only_the_longer_segment_is_shortened(bert: Any) -> None:
    question, passage = "why did they count the ships", " ".join(WORDS * 20)
    encoded = encode([Example(0, ((question, passage),), 0)], bert, max_length=40)
    batch = collate(encoded, [0], bert.pad_token_id)
    text = bert.decode(batch.input_ids[0])
    assert text.startswith(f"[CLS] {question} [SEP] the keeper counted")
    assert batch.input_ids.shape == (1, 40)
    assert batch.token_type_ids is not None
    assert batch.token_type_ids[0].tolist() == [0] * 8 + [1] * 32


def test_a_segment_that_many_rows_share_is_held_once(bert: Any) -> None:
    passage = " ".join(WORDS * 5)
    one = encode([Example(0, ((passage, "a ship"),), 0)], bert, 128)
    many = encode([Example(n, ((passage, "a ship"),), 0) for n in range(50)], bert, 128)
    assert np.array_equal(one.segment_ids, many.segment_ids)
    assert len(many.lengths) == 50


def test_a_choice_keeps_its_candidates_together(bert: Any) -> None:
    examples = [
        Example(0, (("where", "a"), ("where", "in the old harbour")), (1,)),
        Example(1, (("who", "a"), ("who", "b"), ("who", "c")), (0, 2)),
        Example(2, (("when", "now"),), (0,)),
    ]
    encoded = encode(examples, bert, 32)
    assert encoded.sizes.rows.tolist() == [2, 3, 1]
    assert encoded.sizes.longest.tolist() == [8, 5, 5]
    batch = collate(encoded, [1, 0], bert.pad_token_id)
    assert batch.rows_per_example == [3, 2]
    assert batch.indices.tolist() == [1, 0]
    assert batch.targets is not None
    assert batch.targets.dtype == torch.bool
    assert batch.targets.tolist() == [True, False, True, False, True]
    assert batch.input_ids.shape == (5, 8)
    assert batch.tokens == 5 + 5 + 5 + 5 + 8
    assert batch.padded_tokens == 40
    assert "who" in bert.decode(batch.input_ids[2])
    assert "harbour" in bert.decode(batch.input_ids[4])


def test_targets_have_the_dtype_of_their_kind(bert: Any) -> None:
    def targets(*values: Any) -> torch.Tensor | None:
        examples = [Example(n, (("a ship", None),), value) for n, value in enumerate(values)]
        return collate(encode(examples, bert, 16), range(len(values)), 0).targets

    classes, numbers = targets(1, 0), targets(1.0, 0.5)
    assert classes is not None
    assert classes.dtype == torch.int64
    assert classes.tolist() == [1, 0]
    assert numbers is not None
    assert numbers.dtype == torch.float32
    assert numbers.tolist() == [1.0, 0.5]
    assert targets(1, None) is None


def test_no_examples_give_a_batch_of_no_rows(bert: Any) -> None:
    encoded = encode([Example(0, (("a ship", None),), 1)], bert, 16)
    batch = collate(encoded, [], bert.pad_token_id)
    assert batch.input_ids.shape == (0, 0)
    assert batch.tokens == batch.padded_tokens == 0
    assert batch.rows_per_example == []


def test_an_empty_text_is_a_row_of_special_tokens(bert: Any) -> None:
    encoded = encode([Example(0, (("", None),), 1), Example(1, (("ship", None),), 1)], bert, 16)
    batch = collate(encoded, [0, 1], bert.pad_token_id)
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_to_moves_every_tensor(bert: Any) -> None:
    encoded = encode([Example(0, (("a", "b"),), 1)], bert, 16)
    moved = collate(encoded, [0], 0).to(torch.device("meta"))
    tensors = (moved.input_ids, moved.attention_mask, moved.token_type_ids, moved.targets)
    assert all(tensor is not None and tensor.device.type == "meta" for tensor in tensors)


def test_no_room_for_text_is_refused(bert: Any) -> None:
    with pytest.raises(UserError, match="max_length 4 leaves no room"):
        encode([Example(0, (("a", "b"),), 1)], bert, 4)
