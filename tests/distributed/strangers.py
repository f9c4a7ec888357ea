"""A process that can connect to a job's ranks and does not know its secret."""

from __future__ import annotations

import os
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpc_dist.distributed.messages import Messages
from tests.processes import wait_until

WAIT = timedelta(seconds=20)
GUESSED = ["", "gpc-dist/"]
"""What the names of keys might begin with."""


class Trap:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path):
        self._folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._folder,)


def store_of(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=WAIT)


def write_everywhere(port: int, trap: Path) -> None:
    """Put pickles under all names that there are or that might be looked at."""
    store = store_of(port)
    pickled = pickle.dumps(Trap(trap))
    names = [f"{begin}{name}" for begin in GUESSED for name in ("rank-1", "met", "0", "default_pg/0//0")]
    for name in [*names, *store.list_keys()] if hasattr(store, "list_keys") else names:
        store.set(name, pickled)


def take_a_place(port: int, trap: Path, rank: int, way: str) -> None:
    """Join as a rank of two, and send pickles as PyTorch does (`pickles`), or in the form of this program's messages
    (`messages`). For the second, the names of the keys are listed."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    whole = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, timeout=WAIT, wait_for_workers=False)
    begins = GUESSED
    if way == "messages":
        wait_until(whole.list_keys)
        begins = [whole.list_keys()[0].removesuffix(f"rank-{1 - rank}")]
    for begin in begins:
        for name in (f"rank-{rank}", "met"):
            whole.set(f"{begin}{name}", "")
    store = dist.PrefixStore(begins[0].removesuffix("/"), whole) if way == "messages" else whole
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=WAIT)
    if way == "messages":
        Messages(rank, 2, torch.device("cpu"), b"").gather(pickle.dumps(Trap(trap)))
    else:
        dist.gather_object(Trap(trap))
