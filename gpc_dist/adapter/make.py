"""New adapters: for a model of `transformers` in a notebook (`attach`), and for a graft (`new_adapter`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpc_dist.adapter.families import TESTED, locate, probe
from gpc_dist.adapter.fingerprint import identify
from gpc_dist.adapter.graft import GraftedEncoder, refuse_training_the_encoder
from gpc_dist.adapter.halves import check_halves
from gpc_dist.adapter.lane import Adapter
from gpc_dist.adapter.prompt import starting_prompt
from gpc_dist.adapter.transfer import read_source, start_from
from gpc_dist.config import AdapterConfig
from gpc_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def attach(
    encoder: PreTrainedModel,
    config: AdapterConfig | None = None,
    *,
    outputs: int = 2,
    tokenizer: PreTrainedTokenizerBase | None = None,
    label_words: Sequence[str] = (),
    seed: int = 0,
) -> GraftedEncoder:
    """Attach a new adapter to a pretrained encoder of `transformers`.

    The encoder is frozen and put in eval mode; train `result.adapter.parameters()`. With `init_from` its prompt and
    cell start from another adapter, but not its head, because the labels are not known here.

    Args:
        config: method, prompt, cell; GPC with its defaults when not given.
        outputs: classes of a classification, or 1 for a score or a number.
        tokenizer, label_words: for the prompt's starting values (`AdapterConfig.prompt_init`).
        seed: seed of all starting values.

    Raises:
        UserError: the encoder's family cannot hold a prompt, or the method trains the encoder; or the adapter cannot
            start from another one (see `transfer`).
    """
    config = config or AdapterConfig()
    refuse_training_the_encoder(config)
    parts = locate(encoder)
    first_layer = config.entry_layer(parts.shape.layers)
    if encoder.config.model_type not in TESTED:
        probe(parts)
        check_halves(parts, first_layer)
    model = GraftedEncoder(parts, [], first_layer)
    adapter = new_adapter(model, config, outputs, tokenizer=tokenizer, label_words=label_words, seed=seed)
    if config.init_from is not None:
        start_from(adapter, read_source(config.init_from), identify(parts.encoder), same_labels=False)
    model.lanes.append(adapter)
    return model


def new_adapter(
    model: GraftedEncoder,
    config: AdapterConfig,
    outputs: int,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    label_words: Sequence[str] = (),
    seed: int = 0,
    entering: Callable[[Tensor], Tensor] | None = None,
) -> Adapter:
    """A new adapter for a graft, not attached to it. Its prompt starts from what enters layer k: embeddings, whose
    table must not be sharded, or text states. (What `init_from` gives it, the caller adds.)

    Args:
        entering: token ids `[n]` of a text -> its states that enter layer k > 0, `[n, H]`; computed by the graft's
            lower half when not given.

    Raises:
        UserError: the prompt leaves no room for text in the encoder's position table, or no layer reads it.
    """
    parts = model.parts
    embeddings: Any = parts.token_embeddings
    device: torch.device = embeddings.weight.device if entering is None else torch.device("cpu")
    adapter = Adapter(config, parts.shape, outputs, seed).to(device)
    if adapter.prompt is None:
        return adapter
    if parts.max_positions is not None and config.prompt_tokens >= parts.max_positions:
        raise UserError(
            f"adapter.prompt_tokens {config.prompt_tokens} leaves no room for text: the encoder has "
            f"{parts.max_positions} positions"
        )

    def states(ids: Tensor) -> Tensor:
        if model.lower is None:
            return embeddings(ids.to(device))
        if entering is not None:
            return entering(ids)
        row = ids.to(device)[None]
        return model.lower(row, torch.ones_like(row))[0]

    with torch.no_grad():
        start = starting_prompt(
            config,
            states,
            embeddings.num_embeddings,
            tokenizer,
            label_words,
            torch.Generator().manual_seed(seed),
        )
        adapter.prompt.start.copy_(start)
    return adapter
