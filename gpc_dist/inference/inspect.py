"""`gpc-dist inspect`: how a trained prompt changes from layer to layer, and how much gradient reaches it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpc_dist.adapter.cell import GatedCell
from gpc_dist.adapter.graft import GraftedEncoder
from gpc_dist.adapter.scale import rms, text_rms
from gpc_dist.tasks import LaneBatch
from gpc_dist.training.losses import summed_loss
from gpc_dist.training.session import Session, lane_batch

_TOGETHER = 16
"""Examples of one pass; few, because the states of all layers are kept for the gradient."""


@dataclass(frozen=True)
class LayerFigures:
    """Figures of the prompt that enters a layer, averaged over examples and prompt positions."""

    layer: int
    """From 0."""
    cosine: float
    """Cosine of `p_l` and `p_k`, the prompt that entered the encoder (before layer 0, unless it is a late one)."""
    prompt_rms: float
    """Root mean square of the prompt states."""
    text_rms: float
    """Root mean square of the text states that enter the same layer."""
    gradient_norm: float
    """Norm of the gradient of an example's loss with respect to its `p_l [P, H]`."""
    written: float | None
    """Relative change by the cell before this layer: norm of `p_l - e` divided by the norm of `e`, the prompt that the
    previous layer encoded; None if no cell acted."""
    gate: float | None
    """Gate of a gated cell before this layer, averaged over features as well: 0 keeps `e`, 1 keeps the previous
    prompt; None for other cells."""


@dataclass
class _Sums:
    """Sums of one layer's figures over the rows of a rank's batches, to be divided by the number of rows."""

    rows: int = 0
    cosine: float = 0.0
    prompt_rms: float = 0.0
    text_rms: float = 0.0
    gradient_norm: float = 0.0
    written: float | None = None
    gate: float | None = None


@dataclass
class _Seen:
    """What the hooks recorded in one pass."""

    states: list[Tensor] = field(default_factory=list)
    """`h_l [R, P+T, H]`, the input of each layer."""
    encoded: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> `e_l [R, P, H]`, for layers after which a cell acts."""
    gates: dict[int, float] = field(default_factory=dict)


def inspect(session: Session, examples: int) -> list[LayerFigures] | None:
    """The figures of each layer, first to last, on the first `examples` examples of the validation split.

    Every rank must call it; rank 0 gets the figures, other ranks None.
    """
    model, task, world = session.model, session.task, session.world
    split = session.split(task.read("validation")[:examples], cached=False)
    first, count = model.first_layer, len(split.encoded)
    sums = [_Sums() for _ in session.base.parts.layers[first:]]
    together = min(_TOGETHER, math.ceil(count / world.size))
    passes = [np.arange(start, min(start + together, count)) for start in range(0, count, together)]
    for turn in range(0, len(passes), world.size):
        # under ZeRO-3 a pass is a collective: a rank that has none left runs one and drops what it has seen
        own = passes[turn:][world.rank : world.rank + 1]
        batch = lane_batch([(split, own[0] if own else passes[0])], session.pad_id).to(world.device)
        seen = _pass(session, batch)
        for place, one in enumerate(sums if own else ()):
            _add(one, place, seen, batch.attention_mask, model.prompt_tokens)
    gathered = world.gather([asdict(one) for one in sums])
    if gathered is None:
        return None
    of_ranks = [[_Sums(**each) for each in part] for part in gathered]
    return [_mean(layer, parts) for layer, parts in enumerate(zip(*of_ranks, strict=True), start=first)]


def _mean(layer: int, parts: Sequence[_Sums]) -> LayerFigures:
    """The figures of a layer from the sums of all ranks."""
    rows = sum(part.rows for part in parts)
    figures: dict[str, Any] = {}
    for name in (each.name for each in fields(_Sums) if each.name != "rows"):
        known = [value for part in parts if (value := getattr(part, name)) is not None]
        figures[name] = sum(known) / rows if known else None
    return LayerFigures(layer=layer, **figures)


def _pass(session: Session, batch: LaneBatch) -> _Seen:
    """Run one forward and backward pass; return the recorded states, with their gradients."""
    seen, model = _Seen(), session.model
    model.eval()
    with _watched(model, seen), torch.enable_grad():
        (outputs,) = session.run(batch, model.adapters)
        summed_loss(session.task.kind, outputs, batch.lanes[0]).backward()
    return seen


@contextmanager
def _watched(model: GraftedEncoder, seen: _Seen) -> Iterator[None]:
    """Add hooks to the graft's own for one pass, in which each layer runs once, in order.

    The hook on a layer's input runs before the graft's, which reads `p_l` from that input for the cell: so the
    gradient there is the sum over both paths, through the layer and through the cell.
    """

    def enters(_: nn.Module, args: tuple[Any, ...]) -> None:
        args[0].retain_grad()
        seen.states.append(args[0])

    def writes(cell: nn.Module, args: tuple[Any, ...], _: Tensor) -> None:
        after = len(seen.states) - 1
        encoded, previous = (state.detach() for state in args[:2])
        seen.encoded[after] = encoded
        if isinstance(cell, GatedCell):
            *states, _size = cell.read(encoded, previous)
            seen.gates[after] = cell.gate(*states).mean().item()

    with ExitStack() as hooks:
        for layer in model.parts.layers[model.first_layer :]:
            hooks.callback(layer.register_forward_pre_hook(enters, prepend=True).remove)
        for cell in model.adapter.cell or []:
            hooks.callback(cell.register_forward_hook(writes).remove)
        yield


@torch.no_grad()
def _add(sums: _Sums, place: int, seen: _Seen, attention_mask: Tensor, tokens: int) -> None:
    """Add the rows of a pass to the sums of a layer, by its place among those from k on."""
    states, first = seen.states[place].float(), seen.states[0].float()
    rows, prompt = len(states), states[:, :tokens]
    sums.rows += rows
    sums.cosine += F.cosine_similarity(prompt, first[:, :tokens], dim=-1).mean(1).sum().item()
    sums.prompt_rms += rms(prompt).mean(1).sum().item()
    sums.text_rms += text_rms(states[:, tokens:], attention_mask).sum().item()
    gradient = seen.states[place].grad
    assert gradient is not None
    sums.gradient_norm += gradient[:, :tokens].float().flatten(1).norm(dim=1).sum().item()
    if (encoded := seen.encoded.get(place - 1)) is not None:
        change = (prompt - encoded).norm(dim=-1) / encoded.norm(dim=-1)
        sums.written = (sums.written or 0.0) + change.mean(1).sum().item()
    if (gate := seen.gates.get(place - 1)) is not None:
        sums.gate = (sums.gate or 0.0) + gate * rows
