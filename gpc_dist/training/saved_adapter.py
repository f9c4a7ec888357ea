"""Saved adapters on all ranks: one that is put to use, and the one from which a run starts (`adapter.init_from`)."""

from __future__ import annotations

from pathlib import Path

from gpc_dist import config as configuration
from gpc_dist.adapter.lane import Adapter
from gpc_dist.adapter.store import AdapterCard, load_adapter
from gpc_dist.adapter.transfer import Source, read_source
from gpc_dist.config import Config
from gpc_dist.distributed.world import World
from gpc_dist.errors import UserError
from gpc_dist.tasks import Task, make_task


def load_on_all(folder: Path, world: World) -> tuple[Adapter, AdapterCard]:
    """Load a saved adapter (see `load_adapter`) on every rank, all of which must call it.

    Raises:
        UserError: on any rank, the folder has no adapter, or another one than on rank 0; raised on every rank.
    """
    adapter, card = world.on_all(lambda: load_adapter(folder))
    _check_same(card.weights_sha256, str(folder), world)
    return adapter, card


def source_of(config: Config, world: World) -> Source | None:
    """The adapter from which a run that begins is to start; None without `adapter.init_from`. Every rank must call it.

    Raises:
        UserError: see `read_source`; or a rank has another one than rank 0; raised on every rank.
    """
    place = config.adapter.init_from
    if place is None:
        return None
    source = world.on_all(lambda: read_source(place))
    _check_same(source.weights_sha256, place, world)
    return source


def answers_alike(task: Task, card: AdapterCard) -> bool:
    """Whether a head for a task answers with what an adapter's does: with the same labels in the same order, which are
    the same words in ordinary language; or, where there are no labels, whether it is for the same task."""
    if not card.task.keys() >= {"task", "data"}:
        return False
    try:
        own = configuration.build({"task": card.task["task"], "data": card.task["data"]})
        theirs = make_task(own.task, own.data)
    except UserError:  # from another version: its labels are not known
        return False
    if task.kind != theirs.kind or not task.labels:
        return (task.kind, task.name) == (theirs.kind, theirs.name)
    return (task.labels, task.label_words) == (theirs.labels, theirs.label_words)


def _check_same(weights_sha256: str | None, place: str, world: World) -> None:
    """Raise UserError, on every rank, if one sees another adapter in a place than rank 0."""
    found = world.from_all(weights_sha256)
    if others := [rank for rank, each in enumerate(found) if each != found[0]]:
        raise UserError(
            f"rank {others[0]} sees another adapter in {place} than rank 0: give a folder that all ranks see alike"
        )
