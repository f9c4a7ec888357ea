"""The ranks of a pack: one Ray actor for each, in a placement group of their own."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpc_dist import config
from gpc_dist.distributed.launch import SECRET

if TYPE_CHECKING:
    from gpc_dist.training.pack import Pack


class Rank:
    """One rank; a Ray actor. All ranks of a pack get the same calls in the same order."""

    def __init__(self, rank: int, size: int, threads: int, folder: str):
        os.chdir(folder)
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(size),
            LOCAL_RANK=str(rank),  # without effect where Ray makes only the actor's own GPU visible
            OMP_NUM_THREADS=str(threads),
        )
        self._pack: Pack | None = None

    def address(self) -> tuple[str, int]:
        """Return this host and a free port on it, at which the ranks can connect."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, probe.getsockname()[1]

    def open(self, tree: dict[str, Any], host: str, port: int, secret: str) -> str:
        """Connect to the other ranks and load the encoder; returns the host's name.

        Args:
            secret: what the ranks of this pack know, and nobody else.
        """
        os.environ.update({"MASTER_ADDR": host, "MASTER_PORT": str(port), SECRET: secret})
        from gpc_dist.distributed.world import init_world
        from gpc_dist.training.pack import Pack

        settings = config.build(tree)
        self._pack = Pack(settings, init_world(settings.engine))
        return socket.gethostname()

    def add(
        self, name: str, tree: dict[str, Any], command: Sequence[str], state: str | None, heard: int | None
    ) -> None:
        """See `Pack.add`.

        Args:
            state: folder of another run's checkpoint to start from.
        """
        assert self._pack is not None
        self._pack.add(name, config.build(tree), command, Path(state) if state else None, heard)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the pack."""
        return getattr(self._pack, method)(*arguments)
