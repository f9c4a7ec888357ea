"""Where a prompt starts from: `vocab`, `text`, `labels` and `uniform`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gpc_dist.adapter import AdapterConfig, attach
from gpc_dist.adapter.prompt import FREQUENT_TOKENS, starting_prompt
from gpc_dist.errors import UserError

from .encoders import tiny

SENTENCE = "Does the hypothesis follow from the premise?"


def start(
    model: Any, seed: int = 0, tokenizer: Any = None, labels: tuple[str, ...] = (), **options: Any
) -> Tensor:
    config = AdapterConfig(method="prompt-tuning", **options)
    graft = attach(model, config, tokenizer=tokenizer, label_words=labels, seed=seed)
    return graft.adapter.prompt.start.detach()


def ids_of(prompt: Tensor, model: Any) -> list[int]:
    """The tokens whose embeddings the rows of a prompt are, bit for bit."""
    table = model.get_input_embeddings().weight.detach().numpy()
    places = {row.tobytes(): i for i, row in enumerate(table)}
    return [places[row.tobytes()] for row in prompt.numpy()]


def test_vocab_samples_the_most_frequent_tokens_that_are_words(minilm_tokenizer: Any) -> None:
    config = AdapterConfig(prompt_tokens=FREQUENT_TOKENS)
    arguments = (minilm_tokenizer.vocab_size, minilm_tokenizer, [], torch.Generator().manual_seed(0))
    sample = starting_prompt(config, lambda ids: ids[:, None], *arguments).flatten().int().tolist()
    tokens = minilm_tokenizer.convert_ids_to_tokens(sorted(sample))
    first = minilm_tokenizer.convert_tokens_to_ids("!")  # specials and placeholders stand before it
    assert first == 999
    assert tokens == minilm_tokenizer.convert_ids_to_tokens(list(range(first, first + FREQUENT_TOKENS)))
    assert sample != sorted(sample)


def test_vocab_rows_are_the_encoders_own_embeddings(minilm: Any, minilm_tokenizer: Any) -> None:
    ids = ids_of(start(minilm, tokenizer=minilm_tokenizer, prompt_tokens=200), minilm)
    assert len(set(ids)) == 200


def test_vocab_depends_on_the_seed_alone(minilm: Any, minilm_tokenizer: Any) -> None:
    first, again, other = (start(minilm, seed, minilm_tokenizer) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_vocab_without_a_tokenizer_samples_the_whole_small_table() -> None:
    model = tiny("t5")
    assert sorted(ids_of(start(model, prompt_tokens=101), model)) == list(range(101))


@pytest.mark.parametrize("tokens", [4, 8, 21])
def test_text_is_repeated_or_cut_to_the_prompts_length(
    minilm: Any, minilm_tokenizer: Any, tokens: int
) -> None:
    words = minilm_tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]
    assert len(words) == 8
    options = {"prompt_init": "text", "prompt_text": SENTENCE, "prompt_tokens": tokens}
    prompt = start(minilm, tokenizer=minilm_tokenizer, **options)
    assert ids_of(prompt, minilm) == (words * 3)[:tokens]


def test_labels_come_first_and_the_vocabulary_fills_the_rest(minilm: Any, minilm_tokenizer: Any) -> None:
    labels = ("entailment", "neutral", "contradiction")
    words = [i for label in labels for i in minilm_tokenizer(label, add_special_tokens=False)["input_ids"]]
    options = {"tokenizer": minilm_tokenizer, "labels": labels, "prompt_init": "labels"}
    ids = ids_of(start(minilm, prompt_tokens=10, **options), minilm)
    sampled = ids_of(start(minilm, tokenizer=minilm_tokenizer, prompt_tokens=10), minilm)
    assert ids == words + sampled[: 10 - len(words)]
    assert ids_of(start(minilm, prompt_tokens=2, **options), minilm) == words[:2]


@pytest.mark.parametrize("init", ["vocab", "labels", "text"])
def test_a_prompt_longer_than_the_vocabulary_is_filled_by_repetition(init: str) -> None:
    table = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    config = AdapterConfig(prompt_init=init, prompt_text="ab", prompt_tokens=40)
    generator = torch.Generator().manual_seed(0)
    prompt = starting_prompt(config, lambda ids: table[ids], 7, _Letters(), ["a", "b"], generator)
    assert prompt.shape == (40, 3)
    rows = {int((table == row).all(dim=1).nonzero()) for row in prompt}
    assert rows == ({1, 2} if init == "text" else {1, 2, 3, 4, 5, 6})  # the special token is none of them


class _Letters:
    """A tokenizer of seven letters; the first is special."""

    all_special_ids = (0,)

    def __len__(self) -> int:
        return 7

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": ["_abcdef".index(letter) for letter in text]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return ["_abcdef"[i] for i in ids]


def test_uniform_noise_has_the_standard_deviation_of_the_table(minilm: Any) -> None:
    prompt = start(minilm, prompt_init="uniform", prompt_tokens=200)
    std = minilm.get_input_embeddings().weight[:FREQUENT_TOKENS].std()
    assert prompt.std().item() == pytest.approx(std.item(), rel=0.05)
    # uniform: no value lies beyond sqrt(3) standard deviations, and the values reach that far
    assert prompt.abs().max().item() == pytest.approx(prompt.std().item() * 3**0.5, rel=0.01)
    assert abs(prompt.mean().item()) < 0.02 * prompt.std().item()


def test_uniform_noise_of_one_seed_is_the_same() -> None:
    first, again, other = (start(tiny("electra"), seed, prompt_init="uniform") for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (20, 16)  # the embedding size, not the hidden size


@pytest.mark.parametrize("init", ["text", "labels"])
def test_words_without_a_tokenizer_are_refused(init: str) -> None:
    with pytest.raises(UserError, match=f"prompt_init '{init}' needs the encoder's tokenizer"):
        start(tiny("bert"), prompt_init=init, prompt_text="yes", labels=("yes",))


@pytest.mark.parametrize(
    "words",
    [{"prompt_init": "labels"}, {"prompt_init": "text", "prompt_text": " \n"}],
    ids=["labels", "text"],
)
def test_no_words_to_start_from_are_refused(
    minilm: Any, minilm_tokenizer: Any, words: dict[str, str]
) -> None:
    with pytest.raises(UserError, match="found no words to start from"):
        start(minilm, tokenizer=minilm_tokenizer, **words)


def test_a_text_start_needs_a_text() -> None:
    with pytest.raises(ValueError, match=r"needs adapter\.prompt_text"):
        AdapterConfig(prompt_init="text")
