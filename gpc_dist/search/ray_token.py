"""The token of a Ray cluster.

Ray's processes listen on all interfaces, and whoever they answer runs code as their user: they are to answer only those
who know a secret. Ray has tokens from 2.52 on, and asks for one by itself in the cluster of a program from 2.59 on.
"""

from __future__ import annotations

import http.client
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from gpc_dist.errors import MachineError

log = logging.getLogger(__name__)

MODE, TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
_ANSWER_S = 10.0


def make_token() -> None:
    """Set the token of a Ray that this process starts.

    Ray would write one into the home folder, for all later clusters of this user. One for all searches of a process,
    because Ray reads it once.

    Raises:
        MachineError: the environment says that there is to be none.
    """
    mode = os.environ.get(MODE, "token")
    if mode.lower() != "token":
        raise MachineError(
            f"{MODE} is '{mode}', and the Ray of a search answers nobody without a token: unset it"
        )
    if not os.environ.get(TOKEN):
        os.environ[TOKEN] = secrets.token_hex(32)


def check_token() -> None:
    """Check that a node starts its part of a Ray with the token that all nodes have.

    Raises:
        MachineError: there is none.
    """
    mode = os.environ.get(MODE, "")
    if mode.lower() != "token" or not os.environ.get(TOKEN):
        raise MachineError(
            "the nodes of a search answer nobody without a token: start them by slurm/tune.sbatch, which makes one, "
            f"or export {MODE}=token and {TOKEN} before srun"
        )


def check_nodes(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Check that all nodes of a cluster that was entered ask for a token. Who says that there is to be none, in words
    that are Ray's own, is warned.

    Args:
        nodes: as from `ray.nodes`.

    Raises:
        MachineError: one does not.
    """
    open_nodes = [node["NodeManagerAddress"] for node in nodes if node["Alive"] and not _asks(node)]
    if not open_nodes:
        return
    said = f"the Ray at {open_nodes[0]} asks for no token: whoever reaches it can run code as its user"
    if os.environ.get(MODE, "").lower() != "disabled":
        raise MachineError(
            f"{said}. Start it with {MODE}=token and a {TOKEN}, the same here; or, where nobody else reaches it, set "
            f"{MODE}=disabled"
        )
    log.warning("%s, as %s=disabled says", said, MODE)


def _asks(node: Mapping[str, Any]) -> bool:
    """Whether a node refuses a request without a token: of its processes, one speaks plain HTTP."""
    agent = http.client.HTTPConnection(
        node["NodeManagerAddress"], node["RuntimeEnvAgentPort"], timeout=_ANSWER_S
    )
    try:
        agent.request("GET", "/")
        return agent.getresponse().status == http.client.UNAUTHORIZED
    except (OSError, http.client.HTTPException):
        return False
    finally:
        agent.close()
