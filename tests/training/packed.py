"""Run a pack as a search does, on the ranks this is started as: `python -m tests.training.packed FILE`.

FILE holds {"first": [...], "then": {"after": name, "step": s, "join": [...], "leave": name}}: runs as recipe and
settings, and what happens once a run has been evaluated at a step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gpc_dist import config
from gpc_dist.engine.distributed import join
from gpc_dist.training.event import Event
from gpc_dist.training.pack import Pack


def run_pack(plan: dict[str, Any]) -> list[Event]:
    """All events until the pack is empty."""
    configs = {name: config.load(*run) for name, run in plan["runs"].items()}
    first = configs[plan["first"][0]]
    world = join(first.engine)
    pack = Pack(first, world)
    for name in plan["first"]:
        pack.join(name, configs[name], ["gpc-dist"])
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
                        pack.join(name, configs[name], ["gpc-dist"])
    world.leave()
    return found


if __name__ == "__main__":
    run_pack(json.loads(Path(sys.argv[1]).read_text()))
