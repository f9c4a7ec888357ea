"""Start an adapter from another one on the same encoder, as SPoT does (Vu et al. 2022, arXiv 2110.07904).

What is taken of each part, and when:

* the prompt, from any method that has one, where both enter before the same layer: states that enter another layer have
  another size and meaning. A longer prompt starts with the source's tokens, and the rest as `adapter.prompt_init` says;
  a shorter one takes the first of them. The prompts of later layers (`deep-prompt`) are taken if both have them. With
  `adapter.prompt_mlp` the prompts are taken that the source's MLP makes, and an MLP of one's own starts new;
* the cell, whatever layer the prompts enter, if both are of one rule, with the same units, rank, norm and scale. Cells
  of their own for every layer must act after the same layers;
* the head, if it answers with the same labels in the same order, and reads the same states.

What is not taken starts as in an adapter without a source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpc_dist.adapter.fingerprint import EncoderIdentity
from gpc_dist.adapter.lane import Adapter, Origin
from gpc_dist.adapter.pretrained import adapter_folder
from gpc_dist.adapter.store import WEIGHTS, AdapterCard, load_adapter
from gpc_dist.errors import UserError
from gpc_dist.files import sha256
from gpc_dist.schema import mapping
from gpc_dist.shown import shown

_RULE = ("cell", "cell_units", "cell_rank", "cell_norm", "cell_scale", "cell_per_layer")
"""Keys that decide what the values of a cell mean."""


@dataclass(frozen=True)
class Source:
    """A trained adapter from which another one starts."""

    place: str
    """Folder or Hub id, as `adapter.init_from` names it."""
    adapter: Adapter
    """float32, on the CPU."""
    card: AdapterCard
    task: str
    """Name of the task that it was trained for."""
    weights_sha256: str


def read_source(place: str) -> Source:
    """Read the adapter from which another one is to start.

    Args:
        place: a folder, or a Hub id, from which it is fetched if need be.

    Raises:
        UserError: there is none, it is damaged (see `load_adapter`), or it was trained together with its encoder.
    """
    try:
        folder = adapter_folder(place)
        adapter, card = load_adapter(folder)
        task = mapping("task", card.task.get("task")).get("name", "not recorded")
    except UserError as error:
        raise UserError(f"adapter.init_from: {error}") from None
    if card.adapter.trains_encoder:
        raise UserError(
            f"adapter.init_from {place} was trained together with its encoder (adapter.method fine-tuning), and means "
            "nothing on the frozen one: give an adapter of another method"
        )
    return Source(place, adapter, card, shown(str(task)), card.weights_sha256 or sha256(folder / WEIGHTS))


@torch.no_grad()
def start_from(adapter: Adapter, source: Source, encoder: EncoderIdentity, same_labels: bool) -> str:
    """Give a new adapter what fits of another one, and note it as its origin.

    Args:
        encoder: that of the new adapter.
        same_labels: whether the outputs of both heads stand for the same answers.

    Returns:
        What was taken, and why other parts were not, for a line of the log.

    Raises:
        UserError: the other one was trained on another encoder, or nothing fits.
    """
    try:
        source.card.check_encoder(encoder, adapter.shape)
    except UserError as error:
        raise UserError(f"adapter.init_from {source.place}: {error}, or give another adapter") from None
    taken, said = [], []
    for part, take in _TAKE.items():
        if getattr(adapter, part) is None:
            continue
        try:
            if part == "head" and not same_labels:
                raise _UnlikeError("other labels")
            said.append(f"{part}{take(adapter, source.adapter)}")
        except _UnlikeError as unlike:
            said.append(f"not the {part} ({unlike})")
        else:
            taken.append(part)
    if not taken:
        raise UserError(
            f"adapter.init_from {source.place} has nothing that this adapter could start from: {', '.join(said)}: give "
            "one that shares a part with it, or leave out adapter.init_from"
        )
    adapter.origin = Origin(source.task, source.weights_sha256, taken)
    return ", ".join(said)


class _UnlikeError(Exception):
    """A part cannot start from the other adapter's; the message says in what they differ."""


def _take_prompt(mine: Adapter, theirs: Adapter) -> str:
    """Take the prompt; returns how much of it, if not all."""
    if mine.prompt is None or theirs.prompt is None:
        raise _UnlikeError("there is none")
    if mine.first_layer != theirs.first_layer:
        raise _UnlikeError(f"it enters before layer {theirs.first_layer}, and here before {mine.first_layer}")
    has, needs = theirs.prompt_tokens, mine.prompt_tokens
    common = min(has, needs)
    mine.prompt.start[:common] = theirs.prompt.first[:common]
    if mine.prompt.deep is not None and theirs.prompt.deep is not None:
        mine.prompt.deep[:, :common] = theirs.prompt.made(theirs.prompt.deep)[:, :common]
    if has == needs:
        return ""
    return f" (its first {common} of {has} tokens)" if has > needs else f" ({has} of {needs} tokens)"


def _take_cell(mine: Adapter, theirs: Adapter) -> str:
    """Take the cell, or the cells of all layers."""
    if mine.cell is None or theirs.cell is None:
        raise _UnlikeError("there is none")
    if other := [key for key in _RULE if getattr(mine.config, key) != getattr(theirs.config, key)]:
        raise _UnlikeError(f"another {', '.join(f'adapter.{key}' for key in other)}")
    if mine.config.cell_per_layer and [*mine.cell_layers] != [*theirs.cell_layers]:
        raise _UnlikeError("it has cells for other layers")
    mine.cell.load_state_dict(theirs.cell.state_dict())
    return ""


def _take_head(mine: Adapter, theirs: Adapter) -> str:
    """Take the head."""
    if mine.config.pooling != theirs.config.pooling or mine.read_from != theirs.read_from:
        raise _UnlikeError("it reads other states")
    if mine.config.head_hidden != theirs.config.head_hidden:
        raise _UnlikeError("another adapter.head_hidden")
    if mine.outputs != theirs.outputs:  # whatever labels its card names
        raise _UnlikeError(f"it has {theirs.outputs} outputs")
    mine.head.load_state_dict(theirs.head.state_dict())
    return ""


_TAKE: dict[str, Callable[[Adapter, Adapter], str]] = {
    "prompt": _take_prompt,
    "cell": _take_cell,
    "head": _take_head,
}
"""What takes each part of an adapter from another one; returns what the log says behind the part's name."""
