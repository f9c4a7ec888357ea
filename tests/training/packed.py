"""A pack, run as a search does, on the ranks of the process that calls it."""

from __future__ import annotations

from typing import Any

from gpc_dist import config
from gpc_dist.distributed.world import init_world
from gpc_dist.training.pack import Pack
from gpc_dist.training.progress import Event


def run_pack(plan: dict[str, Any]) -> list[Event]:
    """All events until the pack is empty.

    Args:
        plan: {"runs": {name: [recipe, settings]}, "first": [name], "then": [{"after": name, "step": s, "join": [name],
            "leave": [name]}]}: what happens once a run has been evaluated at a step.
    """
    configs = {name: config.load(*run) for name, run in plan["runs"].items()}
    first = configs[plan["first"][0]]
    world = init_world(first.engine)
    pack = Pack(first, world)
    for name in plan["first"]:
        pack.add(name, configs[name], ["gpc-dist"])
    found: list[Event] = []
    while pack.names:
        events = pack.advance(pack.names)
        found += events
        for event in events:
            for then in plan["then"]:
                if (event.name, event.step) == (then["after"], then["step"]):
                    for name in then.get("leave", []):
                        pack.leave(name)
                    for name in then.get("join", []):
                        pack.add(name, configs[name], ["gpc-dist"])
    world.leave()
    return found
