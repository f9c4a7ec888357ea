"""Whom a round of a pack waits for."""

from __future__ import annotations

import asyncio

import pytest

from gpc_dist.search import packs, ray_tune
from gpc_dist.search.packs import Packs, Shape, _Lane, _Pack
from gpc_dist.search.spec import SearchSpec

PATIENCE_S = 0.05


def _scene(*lanes: _Lane) -> tuple[Packs, _Pack]:
    shape = Shape(ranks=1, cpus_per_rank=1, gpus_per_rank=0, lanes=len(lanes), most=1, folder=".")
    pack = _Pack(0, "key", ranks=[], group=None)
    pack.lanes = {f"trial {lane.number}": lane for lane in lanes}
    return Packs(shape), pack


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "_DECIDE_S", PATIENCE_S)


def test_a_pack_that_could_not_start_is_not_started_by_those_who_waited_for_it() -> None:
    """Its ranks would keep their cores for good, and the next pack would wait for them."""

    async def scenario() -> None:
        actor, pack = _scene()
        async with pack.calls:
            waiting = asyncio.ensure_future(actor._start(pack, {}))
            await asyncio.sleep(0)
            actor._fail(pack, RuntimeError("no memory"))
        await waiting

    with pytest.raises(RuntimeError, match="the pack has ended"):
        asyncio.run(scenario())


def test_a_round_waits_for_a_trial_that_is_joining() -> None:
    async def scenario() -> list[str]:
        ready, joining = _Lane(0, 0, joined=True, may_go=True), _Lane(1, 1)
        actor, pack = _scene(ready, joining)
        waiting = asyncio.ensure_future(actor._ready(pack))
        await asyncio.sleep(4 * PATIENCE_S)
        assert not waiting.done()
        joining.joined = joining.may_go = True
        pack.news.set()
        return await waiting

    assert asyncio.run(scenario()) == ["trial 0", "trial 1"]


def test_a_round_does_not_wait_long_for_a_trial_that_decides() -> None:
    async def scenario() -> list[str]:
        actor, pack = _scene(_Lane(0, 0, joined=True, may_go=True), _Lane(1, 1, joined=True))
        return await actor._ready(pack)

    assert asyncio.run(scenario()) == ["trial 0"]


def test_a_round_does_not_wait_for_a_trial_that_left_while_it_joined() -> None:
    async def scenario() -> list[str]:
        actor, pack = _scene(_Lane(0, 0, joined=True, may_go=True), _Lane(1, 1))
        waiting = asyncio.ensure_future(actor._ready(pack))
        await asyncio.sleep(PATIENCE_S)
        del pack.lanes["trial 1"]
        pack.news.set()
        return await waiting

    assert asyncio.run(scenario()) == ["trial 0"]


@pytest.mark.parametrize(
    ("resources", "lanes"),
    [
        ({"pack": 8}, 6),  # 12 trials on two cores
        ({"pack": 4}, 4),
        ({"pack": 8, "concurrent": 3}, 2),
        ({"pack": 16, "ranks": 2}, 12),  # room for one pack
    ],
)
def test_packs_have_the_lanes_that_trials_fill(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, int], lanes: int
) -> None:
    monkeypatch.setattr(ray_tune.ray, "cluster_resources", lambda: {"CPU": 2.0})
    spec = SearchSpec.model_validate(
        {
            "recipe": "demo",
            "space": {"train.lr": {"loguniform": [0.001, 0.1]}},
            "trials": 4,
            "seeds": [0, 1, 2],
            "resources": resources,
        }
    )
    assert ray_tune.pack_shape([spec]).lanes == lanes
