"""Where the ranks of a job meet: a store on rank 0's machine, through which the process group finds its connections.

Who can connect to the store can read and write it. So it listens at the address at which the ranks look for it and at
no other, and the ranks use names in it that follow from the job's secret: what stands under others is not looked at.
Somebody who lists the names can still disturb the job, and can bring ranks to connect elsewhere; they are not believed
there (see `messages`).
"""

from __future__ import annotations

import errno
import hmac
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from gpc_dist.distributed.launch import SECRET
from gpc_dist.errors import UserError

_PATIENCE_S = 10.0
"""Seconds after which a rank says for whom it waits, for the first time."""


def secret() -> bytes:
    """The secret of this job; empty if it has none."""
    return os.environ.get(SECRET, "").encode()


def meet(rank: int, size: int, timeout_s: int) -> dist.Store:
    """The ranks' common store at MASTER_ADDR and MASTER_PORT, when all of them are there.

    Who waits says for whom, on standard error whichever rank it is: rank 0 for the others, and they for rank 0.

    Raises:
        UserError: the environment does not say where.
        OSError: rank 0 cannot listen there.
        RuntimeError: a rank did not come in time.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None or port is None:
        raise UserError(
            f"rank {rank} of {size} (RANK and WORLD_SIZE in the environment) needs MASTER_ADDR and MASTER_PORT there: "
            "start several ranks with torchrun or with the batch scripts in slurm/, or unset RANK and WORLD_SIZE"
        )

    if host.startswith("127."):
        # gloo would listen at the address of the host's name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    def say(missing: Sequence[int]) -> None:
        print(
            f"gpc-dist: rank {rank} of {size} waits at {host}:{port} for {_named(missing)}, at most {timeout_s} s "
            "(engine.timeout_s); to run alone, unset RANK and WORLD_SIZE",
            file=sys.stderr,
            flush=True,
        )

    # torchrun has a store of its own there
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    waiting = threading.Timer(_PATIENCE_S, say, [[0]])
    waiting.daemon = True
    waiting.start()
    try:
        whole = dist.TCPStore(
            host,
            int(port),
            is_master=serves,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=_listen(host, int(port)).detach() if serves else None,
        )
    finally:
        waiting.cancel()
    store = dist.PrefixStore(hmac.digest(secret(), b"names in the store", "sha256").hex(), whole)
    keys, met = [f"rank-{other}" for other in range(size)], "met"
    store.set(keys[rank], "")
    if rank > 0:
        store.wait([met])
        return store
    started, next_s = time.monotonic(), _PATIENCE_S
    while not store.check(keys):
        if (waited_s := time.monotonic() - started) > min(next_s, timeout_s):
            missing = [other for other, key in enumerate(keys) if not store.check([key])]
            if waited_s > timeout_s:
                raise RuntimeError(f"{_named(missing)} did not come within {timeout_s} s")
            say(missing)
            next_s *= 2
        time.sleep(0.02)
    store.set(met, "")
    return store


def _listen(host: str, port: int) -> socket.socket:
    """Listen at the address that the ranks look for, or at all addresses where others know this machine by another:
    its hosts file has its own name at the loopback interface, or its address is translated on the way."""
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    loopback = str(address[0]).startswith("127.") or address[0] == "::1"
    if not loopback or host in ("localhost", address[0]):
        try:
            return socket.create_server((str(address[0]), port), family=family)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _named(ranks: Sequence[int]) -> str:
    return "rank " + ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
