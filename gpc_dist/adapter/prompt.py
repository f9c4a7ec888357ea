"""Starting values of the soft prompt.

`vocab`, `text` and `labels` follow Lester et al. 2021, section 3.1 (initialise from the encoder's own
embeddings: frequent tokens, a given text, or the label words).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpc_dist.config import AdapterConfig
from gpc_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FREQUENT_TOKENS = 5000
"""Tokens that count as frequent: the first ones, because vocabularies are ordered by frequency apart from
special tokens (Lester et al. 2021 sample from the 5,000 most common tokens)."""


def starting_prompt(
    config: AdapterConfig,
    embed: Callable[[Tensor], Tensor],
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase | None,
    label_words: Sequence[str],
    generator: torch.Generator,
) -> Tensor:
    """The starting values of the prompt.

    Args:
        embed: token ids `[n]` -> what enters the prompt's first layer for them: their frozen embeddings `[n, E]`, or
            states `[n, H]`.
        tokenizer: needed by `text` and `labels`; `vocab` uses it to leave special tokens out.
        label_words: the task's labels as words, for `labels`.

    Returns:
        float32 `[P, E]`, or `[P, H]`.

    Raises:
        UserError: `text` or `labels` without a tokenizer or without words.
    """
    count = config.prompt_tokens
    frequent = _frequent_tokens(vocab_size, tokenizer)
    sample = frequent[torch.randperm(len(frequent), generator=generator)][:count]
    if config.prompt_init == "vocab":
        ids = sample
    elif config.prompt_init == "uniform":
        # with this bound, noise has the standard deviation of the embeddings that it replaces
        bound = embed(sample).float().std() * 3**0.5
        size = (count, embed(sample[:1]).shape[-1])
        return (torch.rand(size, generator=generator) * 2 - 1) * bound.cpu()
    else:
        ids = _token_ids(config, tokenizer, label_words)
        if config.prompt_init == "labels":
            # Lester et al.: the positions after the label words are filled from the vocabulary
            ids = torch.cat([ids, sample])
    ids = ids.repeat(-(-count // len(ids)))[:count]
    return embed(ids).float().cpu().clone()


def _frequent_tokens(vocab_size: int, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    if tokenizer is None:
        return torch.arange(min(FREQUENT_TOKENS, vocab_size))
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), vocab_size))))
    # BERT's vocabulary starts with placeholders "[unused0]" ... that were never trained
    ids = [i for i, t in enumerate(tokens) if t and i not in special and not t.startswith("[unused")]
    return torch.tensor(ids[:FREQUENT_TOKENS])


def _token_ids(
    config: AdapterConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    label_words: Sequence[str],
) -> Tensor:
    key = f"adapter.prompt_init '{config.prompt_init}'"
    if tokenizer is None:
        raise UserError(f"{key} needs the encoder's tokenizer: pass tokenizer=")
    texts = [config.prompt_text or ""] if config.prompt_init == "text" else list(label_words)
    ids = [i for t in texts for i in tokenizer(t, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise UserError(f"{key} found no words to start from: use 'vocab', or give the words")
    return torch.tensor(ids)
