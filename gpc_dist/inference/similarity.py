"""`gpc-dist similarity`: how alike adapters are, in their prompts and in what they do to texts.

Of prompts these are the two measures of SPoT (Vu et al. 2022, arXiv 2110.07904, "prompt-based similarity"): the cosine
of the mean tokens, and the mean cosine of all pairs of tokens. What a cell or deep prompts add is not in a prompt, so
the third compares effects: the change of a text's mean state after the last layer that an adapter makes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from gpc_dist.adapter.lane import Adapter
from gpc_dist.adapter.store import AdapterCard
from gpc_dist.config import AdapterConfig, Config
from gpc_dist.distributed.world import World
from gpc_dist.tasks import Example, make_task
from gpc_dist.training.evaluation import all_outputs
from gpc_dist.training.session import Session, Split, load_base, open_session

Matrix = list[list[float | None]]
"""A cosine for each pair, `[n][n]`, symmetric; None where the two cannot be compared."""


@dataclass(frozen=True)
class Similarity:
    """Cosines of each two of n adapters, from -1 to 1."""

    mean_tokens: Matrix
    """Of the means of the prompts' tokens; None for prompts that enter before different layers."""
    tokens: Matrix
    """The mean over all pairs of a token of one prompt and a token of the other; None as above."""
    effects: Matrix
    """The mean over texts of the cosine of the changes that the two make."""


def compare(
    saved: Sequence[tuple[Adapter, AdapterCard]], config: Config, examples: Sequence[Example], world: World
) -> Similarity | None:
    """Compare adapters of one encoder. Every rank must call it; rank 0 gets the result, other ranks None.

    Args:
        saved: adapters with a prompt.
        config: the encoder, the engine, and the task that `examples` are of.
        examples: texts, or pairs of them.

    Raises:
        UserError: an adapter belongs to another encoder.
    """
    adapters = [adapter for adapter, _ in saved]
    changes: dict[int, np.ndarray] = {}
    for first_layer in sorted({adapter.first_layer for adapter in adapters}):
        places = [place for place, each in enumerate(adapters) if each.first_layer == first_layer]
        session = _open(saved, first_layer, config, world)
        split = session.split(list(examples))
        plain = _states(session, _without_prompt(adapters[places[0]]), split)
        for place in places:
            changed = _states(session, adapters[place], split)
            if plain is not None and changed is not None:
                changes[place] = changed - plain
        del session, split
        gc.collect()  # two encoders need not fit; modules of transformers refer to each other
    if not changes:
        return None
    prompts, layers = [_prompt(adapter) for adapter in adapters], [each.first_layer for each in adapters]
    return Similarity(
        mean_tokens=_matrix(mean_tokens, prompts, layers),
        tokens=_matrix(tokens, prompts, layers),
        effects=_matrix(effects, [changes[place] for place in range(len(adapters))]),
    )


def _open(
    saved: Sequence[tuple[Adapter, AdapterCard]], first_layer: int, config: Config, world: World
) -> Session:
    """A session for prompts that enter before a layer. Texts are cut alike for all adapters: as beside the longest
    prompt."""
    longest = max(adapter.prompt_tokens for adapter, _ in saved)
    shared = AdapterConfig(method="prompt-tuning", first_layer=first_layer, prompt_tokens=longest)
    config = config.model_copy(update={"adapter": shared})
    base = load_base(config, world)
    for _, card in saved:
        card.check_encoder(base.identity, base.parts.shape)
    return open_session(config, world, make_task(config.task, config.data), base)


class _Mean(nn.Module):
    """In the place of a head: gives the states `[R, H]` that it would read."""

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        return states[-1]


def _reader(adapter: Adapter) -> Adapter:
    """A copy of an adapter that gives the mean of the text's last states, whatever its own head reads."""
    reader = deepcopy(adapter)
    reader.config = adapter.config.model_copy(update={"pooling": "mean", "head_layers": "last"})
    reader.pooling, reader.read_from = "mean", adapter.shape.layers
    reader.head = _Mean()  # type: ignore[assignment]
    return reader


def _without_prompt(adapter: Adapter) -> Adapter:
    """An adapter that leaves the text as it is, for passes with another one's first layer."""
    plain = Adapter(AdapterConfig(method="linear-probe"), adapter.shape, outputs=1)
    plain.first_layer = adapter.first_layer
    return plain


def _states(session: Session, adapter: Adapter, split: Split) -> np.ndarray | None:
    """The mean of each text's last states beside an adapter's prompt, float64 `[N, H]`, on rank 0; None elsewhere."""
    found = all_outputs(session, [_reader(adapter).to(session.world.device)], split)
    return None if found is None else np.stack(found[0]).astype(np.float64)


def _prompt(adapter: Adapter) -> np.ndarray:
    """The prompt that enters the adapter's first layer, float64 `[P, E or H]`."""
    assert adapter.prompt is not None
    return adapter.prompt.first.detach().cpu().double().numpy()


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors `[n, width]` of length 1; those of length 0 stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def mean_tokens(one: np.ndarray, other: np.ndarray) -> float:
    """Cosine of the means of two prompts' tokens, `[P, width]` each."""
    return tokens(one.mean(axis=0, keepdims=True), other.mean(axis=0, keepdims=True))


def tokens(one: np.ndarray, other: np.ndarray) -> float:
    """Mean cosine over all pairs of a token of one prompt and a token of the other."""
    return float((_unit(one) @ _unit(other).T).mean())


def effects(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over texts of the cosine of two changes of their states, `[N, H]` each."""
    return float((_unit(one) * _unit(other)).sum(axis=1).mean())


def _matrix(
    of: Callable[[np.ndarray, np.ndarray], float],
    values: Sequence[np.ndarray],
    first_layers: Sequence[int] | None = None,
) -> Matrix:
    """A measure of each two of some values; None where their first layers are given and differ."""
    kinds = first_layers or [0] * len(values)
    return [
        [of(one, other) if kind == its else None for other, its in zip(values, kinds, strict=True)]
        for one, kind in zip(values, kinds, strict=True)
    ]
