"""The packs of a search: a trial requests a lane, waits for the events of its run, and leaves.

One Ray actor manages all packs. A pack is a group of rank actors with one encoder and K lanes. It is started when a
trial finds no free lane for its key, and ended when it has no runs and another pack needs its resources.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpc_dist.errors import AlteredError, UserError
from gpc_dist.search.pack_key import PackKey
from gpc_dist.search.ranks import Rank

ACTOR = "gpc-dist-packs"
_DECIDE_S = 1.0
"""Longest time that a pack waits for its trials to decide whether they continue."""
_ROUND_S = 5.0
"""Time after which a pack checks for trials that want to join or leave."""
_ENDED = "the pack has ended: a rank died"
_SHARE = 0.97
"""Share of a rank's CPUs that is requested from Ray; the rest is for the trials' own processes, which only wait."""


@dataclass(frozen=True)
class Shape:
    """Size and resources of a pack."""

    ranks: int
    cpus_per_rank: float
    gpus_per_rank: float
    lanes: int
    most: int
    """Largest number of packs at the same time."""
    folder: str
    """Working folder of the ranks."""


@dataclass(frozen=True)
class Place:
    """Where a trial's run is trained."""

    pack: int
    lane: int
    visit: int
    """Number of this stay in a lane; a trial that joins again gets a new one."""
    host: str


@dataclass
class _Lane:
    number: int
    visit: int
    events: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    """Events, or the error that ended the pack."""
    joined: bool = False
    """Whether the ranks have added its run."""
    may_go: bool = False
    """Whether its trial waits for the next event; otherwise its run is not trained."""
    leaving: bool = False


@dataclass
class _Pack:
    number: int
    key: PackKey
    ranks: list[Any]
    group: Any
    host: str = ""
    lanes: dict[str, _Lane] = field(default_factory=dict)
    calls: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held during a call to all ranks, which need the same order of calls."""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a trial has joined, has left or waits for its next event."""
    alive: bool = True


class Packs:
    """The Ray actor that manages all packs; see the module's docstring.

    Args:
        shape: of every pack.
    """

    def __init__(self, shape: Shape):
        self._shape = shape
        self._packs: list[_Pack] = []
        self._numbers = itertools.count()
        self._visits = itertools.count()
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = asyncio.Event()

    async def warm(self, key: PackKey, tree: dict[str, Any]) -> None:
        """Start a pack for runs with this key, while the trials' processes start."""
        async with self._changed:
            pack = await self._find(key)
        await self._start(pack, tree)

    async def add(
        self,
        name: str,
        key: PackKey,
        tree: dict[str, Any],
        command: Sequence[str],
        state: str | None,
        heard: int | None,
    ) -> Place:
        """Give a run a lane, as soon as there is a free one.

        Args:
            key: packs take runs whose keys can be joined only.
            tree: configuration of the run.
            state: folder of another run's checkpoint to start from; it takes the place of the run's own.
            heard: see `training.pack.Pack.add`.

        Raises:
            UserError: the run's configuration cannot be trained.
        """
        if stayed := self._lane_of(name):
            await self.leave(name, stayed.visit, "goes on elsewhere")  # its previous process has not left yet
        async with self._changed:
            pack = await self._find(key)
            number = min(set(range(self._shape.lanes)) - {lane.number for lane in pack.lanes.values()})
            pack.lanes[name] = lane = _Lane(number, next(self._visits))
        try:
            if not pack.ranks:
                await self._start(pack, tree)
            await self._all(pack, "add", name, tree, command, state, heard)
        except BaseException:
            pack.lanes.pop(name, None)
            await self._notify(pack)
            raise
        lane.joined = True
        pack.news.set()
        return Place(pack.number, lane.number, lane.visit, pack.host)

    async def next(self, name: str) -> Any:
        """Wait for the next `training.progress.Event` of a run, which is trained meanwhile.

        Raises:
            RuntimeError: the pack has ended: a rank died.
        """
        pack = self._pack_of(name)
        if pack is None:
            raise RuntimeError(f"{name} has no lane: its pack has ended")
        lane = pack.lanes[name]
        lane.may_go = True
        pack.news.set()
        event = await lane.events.get()
        if isinstance(event, BaseException):
            raise RuntimeError(str(event))
        if event.over:
            pack.lanes.pop(name, None)
            await self._notify(pack)
        return event

    async def save(self, name: str) -> None:
        """Save a run's state in its folder."""
        if pack := self._pack_of(name):
            await self._all(pack, "call", "save", name)

    async def leave(self, name: str, visit: int, reason: str) -> None:
        """Save and stop a run; does nothing if it has ended, or has joined again since that visit."""
        pack, lane = self._pack_of(name), self._lane_of(name)
        if pack and lane and lane.visit == visit and not lane.leaving:
            lane.leaving, lane.may_go = True, False
            try:
                await self._all(pack, "call", "leave", name, "stopped", reason)
            finally:
                pack.lanes.pop(name, None)
                await self._notify(pack)

    async def closed(self) -> None:
        """Wait for `close`: whoever waits notices when this actor is lost."""
        await self._closed.wait()

    async def close(self) -> None:
        """Save and stop all runs: Tune ends trials that wait for an evaluation before they can leave their lane."""
        for pack in list(self._packs):
            joined = [(name, lane) for name, lane in pack.lanes.items() if lane.joined]
            stopping = (self.leave(name, lane.visit, "stopped by the search") for name, lane in joined)
            # a pack that fails here has sent the error to its trials
            await asyncio.gather(*stopping, return_exceptions=True)
            async with self._changed:
                # runs that are being stopped by their own trials
                while pack.alive and any(lane.leaving for lane in pack.lanes.values()):
                    await self._changed.wait()
        self._closed.set()

    async def _find(self, key: PackKey) -> _Pack:
        """Return a pack with a free lane for this key, perhaps a new one without ranks; waits until there is one."""
        while True:
            for pack in self._packs:
                joined = pack.key.joined(key)
                if pack.alive and joined is not None and len(pack.lanes) < self._shape.lanes:
                    pack.key = joined
                    return pack
            if len(self._packs) >= self._shape.most:
                for pack in [pack for pack in self._packs if not pack.lanes]:
                    self._end(pack)
            if len(self._packs) < self._shape.most:
                pack = _Pack(next(self._numbers), key, [], None)
                self._packs.append(pack)
                return pack
            await self._changed.wait()

    async def _start(self, pack: _Pack, tree: dict[str, Any]) -> None:
        """Start the ranks of a pack, once: other callers wait for its lock meanwhile."""
        async with pack.calls:
            if pack.ranks:
                return
            if not pack.alive:  # it could not be started: what would be started for it now, nobody would end
                raise RuntimeError(_ENDED)
            import ray
            from ray.util.placement_group import placement_group
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

            shape = self._shape
            bundle = {"CPU": shape.cpus_per_rank * _SHARE, "GPU": shape.gpus_per_rank}
            bundle = {key: value for key, value in bundle.items() if value}
            try:
                pack.group = placement_group([bundle] * shape.ranks)
                await pack.group.ready()
                make = ray.remote(Rank)
                ranks: list[Any] = [
                    make.options(
                        num_cpus=bundle.get("CPU", 0),
                        num_gpus=shape.gpus_per_rank,
                        scheduling_strategy=PlacementGroupSchedulingStrategy(pack.group, index),
                    ).remote(index, shape.ranks, max(1, int(shape.cpus_per_rank)), shape.folder)
                    for index in range(shape.ranks)
                ]
                host, port = await ranks[0].address.remote()
                secret = secrets.token_hex(32)
                hosts = await asyncio.gather(*(rank.open.remote(tree, host, port, secret) for rank in ranks))
            except BaseException as error:
                self._fail(pack, error)
                raise _cause(error) from None
            pack.ranks, pack.host = ranks, hosts[0]
            if not pack.alive:  # it was ended meanwhile
                self._end(pack)
                raise RuntimeError(_ENDED)
            self._go(self._drive(pack))

    async def _drive(self, pack: _Pack) -> None:
        """Train a pack's lanes in rounds until the pack ends."""
        try:
            while pack.alive:
                names = await self._ready(pack)
                for event in await self._all(pack, "call", "advance", names, _ROUND_S) if names else []:
                    lane = pack.lanes.get(event.name)
                    if lane is not None:
                        lane.may_go = False
                        lane.events.put_nowait(event)
        except BaseException as error:
            self._fail(pack, error)

    async def _ready(self, pack: _Pack) -> list[str]:
        """Return the runs to train next.

        Waits at most `_DECIDE_S` until every trial has decided whether it continues, and without limit for trials
        that are joining: a step without them costs nearly as much as a step with them.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _DECIDE_S
        while pack.alive:
            going = [name for name, lane in pack.lanes.items() if lane.may_go]
            joining = any(not lane.joined for lane in pack.lanes.values())
            if joining:
                deadline = loop.time() + _DECIDE_S
            left_s = deadline - loop.time()
            if going and (len(going) == len(pack.lanes) or left_s <= 0):
                return going
            pack.news.clear()
            try:
                # no deadline without a run that could be trained
                await asyncio.wait_for(pack.news.wait(), None if joining or not going else left_s)
            except TimeoutError:
                continue
        return []

    async def _all(self, pack: _Pack, method: str, *arguments: Any) -> Any:
        """Call a method on all ranks; returns what rank 0 returns.

        Raises:
            UserError: all ranks refuse the call; the pack stays usable. Any other error ends the pack, and so does an
                `AlteredError`: its encoder is not to be trusted any more.
        """
        async with pack.calls:
            if not pack.alive:
                raise RuntimeError(_ENDED)
            try:
                found = await asyncio.gather(
                    *(getattr(rank, method).remote(*arguments) for rank in pack.ranks)
                )
            except BaseException as error:
                cause = _cause(error)
                if not isinstance(cause, UserError) or isinstance(cause, AlteredError):
                    self._fail(pack, error)
                raise cause from None
            return found[0]

    def _fail(self, pack: _Pack, error: BaseException) -> None:
        """End a pack and send the error to its trials, which Ray Tune restarts from their checkpoints."""
        for lane in pack.lanes.values():
            lane.events.put_nowait(_cause(error))
        self._end(pack)

    def _end(self, pack: _Pack) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        pack.alive = False
        pack.news.set()
        if pack in self._packs:
            self._packs.remove(pack)
        for rank in pack.ranks:
            ray.kill(rank)
        if pack.group is not None:
            remove_placement_group(pack.group)
        self._go(self._notify(pack))  # there is room for another pack

    def _go(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the background. A reference is kept: without one, the task could be garbage-collected."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _notify(self, pack: _Pack) -> None:
        pack.news.set()
        async with self._changed:
            self._changed.notify_all()

    def _pack_of(self, name: str) -> _Pack | None:
        return next((pack for pack in self._packs if name in pack.lanes), None)

    def _lane_of(self, name: str) -> _Lane | None:
        pack = self._pack_of(name)
        return pack.lanes[name] if pack else None


def _cause(error: BaseException) -> BaseException:
    """Return the error that a rank raised, without Ray's wrapper."""
    return getattr(error, "cause", None) or error
