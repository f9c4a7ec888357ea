"""Silent wrongness: frozen weights that change in memory, and copies of an adapter that are no longer one adapter.

A sum of a tensor's bits, as 64-bit words modulo 2^64, is read at the speed of memory and changes with any one flipped
bit. Each rank keeps such sums of the frozen weights it holds, whole or as its shard, and finds by itself that one has
changed. What every rank holds is compared across the ranks: whole weights, the adapter and, at stage 0, the optimizer's
moments.

Not seen is what leaves the sum of a tensor as it was (two flips that cancel, words that change places), what is gone
before the next check (activations, gradients, layers that ZeRO-3 gathers for a pass), and what no other copy and no
earlier sum speaks of: moments of stages 1 to 3, shards of what is fine-tuned, a shard on NVMe, text states in a cache.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from gpc_dist.distributed import checkpoint
from gpc_dist.distributed.optimizer import LaneOptimizer
from gpc_dist.distributed.world import World
from gpc_dist.distributed.zero_optimizer import Optimizer
from gpc_dist.errors import AlteredError

_WORD = 8
"""Bytes of what is summed."""


class Integrity:
    """Checks the frozen weights of a session and the adapters that are trained with them. Every rank makes the same
    calls in the same order.

    Args:
        model: runs all passes.
        below: gives what else this rank computes text states with, perhaps without the others; None if nothing.
    """

    def __init__(self, world: World, model: nn.Module, below: Callable[[], nn.Module | None]):
        self._world, self._model, self._below = world, model, below
        self._first: dict[str, int] = {}
        """Sum of each frozen tensor when it was first seen."""
        self._sound: WeakSet[Optimizer] = WeakSet()
        """What has been checked since the last pass, and the frozen weights with it."""
        model.register_forward_pre_hook(lambda *_: self._sound.clear())

    def check(self, lane: Optimizer, checkpoints: Path) -> None:
        """Check what the passes since the last call were made with: the frozen weights, and the adapter of a lane.

        Does nothing if there was no pass since.

        Args:
            checkpoints: of the lane's run, to say from where it goes on.

        Raises:
            AlteredError: something is not what it was, or not the same on all ranks; raised on every rank.
        """
        if lane in self._sound:
            return
        changed, whole = ("", "") if self._sound else self._frozen()
        mine = {
            "host": socket.gethostname(),
            "changed": changed,
            "frozen": whole,
            "adapter": _digest(_sums(_in_common(lane))),
        }
        if problem := verdict(self._world.from_all(mine)):
            raise AlteredError(f"{problem}: {self._remedy(checkpoints)}")
        self._sound.add(lane)

    def _frozen(self) -> tuple[str, str]:
        """Name of the first frozen tensor of this rank that has changed, if one has; digest of those that every rank
        holds whole."""
        sums = _sums(_held(self._model))
        whole = {name: found for name, found in sums.items() if _PART not in name}
        if below := self._below():
            sums |= _sums((f"below.{name}", tensor) for name, tensor in _held(below))
        changed = [name for name, found in sums.items() if self._first.setdefault(name, found) != found]
        return changed[0] if changed else "", _digest(whole)

    def _remedy(self, checkpoints: Path) -> str:
        newest = self._world.on_main(lambda: getattr(checkpoint.newest(checkpoints), "name", None))
        start = f"goes on from {checkpoints / newest}" if newest else "starts again"
        return (
            "memory failed there, or a file was changed under the run. Nothing was saved since: the same command "
            f"{start}; leave out a machine on which it happens again"
        )


def verdict(found: Sequence[dict[str, Any]]) -> str:
    """What is wrong with what the ranks found, and on which of them; empty if nothing is.

    Args:
        found: `host`, `changed`, `frozen` and `adapter` of each rank, see `Integrity.check`.
    """
    hosts = [each["host"] for each in found]
    if changed := [rank for rank, each in enumerate(found) if each["changed"]]:
        return f"frozen weight {found[changed[0]]['changed']!r} changed in the memory of {_named(changed, hosts)}"
    for what in ("frozen", "adapter"):
        odd = minority([each[what] for each in found])
        if not odd:
            continue
        subject = "the frozen weights differ" if what == "frozen" else "the adapter differs"
        if len(odd) == len(found):
            return f"{subject} between {_named(odd, hosts)}, and no majority says which is right"
        return f"{subject} on {_named(odd, hosts)} from that of the other ranks"
    return ""


def minority(values: Sequence[str]) -> list[int]:
    """Places of the values that differ from what more than half of them are; all places if no value is."""
    value, count = Counter(values).most_common(1)[0]
    return [place for place, each in enumerate(values) if each != value or 2 * count <= len(values)]


def bit_sum(tensor: Tensor) -> Tensor:
    """Sum of a tensor's bits as 64-bit words modulo 2^64, int64 `[]` on its device. Bytes before and after whole words
    are added one by one."""
    octets = tensor.detach().reshape(-1).view(torch.uint8)
    head = min(-octets.storage_offset() % _WORD, len(octets))
    tail = head + (len(octets) - head) // _WORD * _WORD
    edges = torch.cat([octets[:head], octets[tail:]]).sum(dtype=torch.int64)
    return octets[head:tail].view(torch.int64).sum() + edges


def _sums(tensors: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """`bit_sum` of each tensor, and what is no tensor as it is. Waits once for each device."""
    found: dict[str, Any] = {}
    pending: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, value in tensors:
        if isinstance(value, Tensor):
            pending[value.device][name] = bit_sum(value)
        else:
            found[name] = value
    for sums in pending.values():
        found |= zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)
    return found


def _digest(sums: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


_PART = "/"
"""Stands after the name of a weight, before which part of it this rank alone holds."""


def _held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The frozen tensors of a module that are in this rank's memory."""
    yield from module.named_buffers()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_tensor"):
            from gpc_dist.private.deepspeed import kept_parts

            shards, whole = kept_parts(parameter)
            for kind, shard in shards.items():
                yield f"{name}{_PART}{kind}", shard
            if whole is not None:
                yield name, whole
        elif not parameter.is_meta:
            yield name, parameter


def _in_common(lane: Optimizer) -> Iterator[tuple[str, Any]]:
    """What every rank holds of an adapter and its optimizer; of a fine-tuned encoder at stage 3 empty tensors."""
    yield from lane.named.items()
    if isinstance(lane, LaneOptimizer) and lane.inner and not lane.partitioned:
        for name, parameter in lane.named.items():
            for key, value in lane.inner.state.get(parameter, {}).items():
                yield f"{name}/{key}", value


def _named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    listed = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks[:8])
    return listed + (", ..." if len(ranks) > 8 else "")
