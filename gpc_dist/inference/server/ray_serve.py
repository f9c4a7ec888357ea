"""The application as replicas on Ray Serve, which starts, places and replaces them, and spreads requests over them.

Each replica has the encoder and all adapters, and batches the requests that it gets.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig

from gpc_dist.errors import EXIT_DONE, MachineError
from gpc_dist.inference.server.options import TOKEN, Options
from gpc_dist.inference.server.places import Place, look_at_all
from gpc_dist.shown import one_line
from gpc_dist.training.stop import SIGNALS, StopRequest

if TYPE_CHECKING:
    from fastapi import FastAPI

_NAME = "gpc-dist"
_BUSY = 16
"""Requests of a replica, on the average, above which another one is started: with fewer, passes are not full."""
_POLL_S = 0.1


def application(arguments: Mapping[str, Any]) -> serve.Application:
    """For `serve run`, and for Serve's configuration files:

        serve run gpc_dist.inference.server.ray_serve:application adapters=runs/rte,runs/boolq

    Args:
        arguments: `adapters`, separated by commas; `replicas`, such as `1-8`; all else are settings, such as
            `engine.device: cpu`.
    """
    given = dict(arguments)
    places = str(given.pop("adapters")).split(",")
    least, _, most = str(given.pop("replicas", "1")).partition("-")
    settings = {key: str(value) for key, value in given.items()}
    options = Options(places, settings, token=os.environ.get(TOKEN) or None)
    return deployed(options, (int(least), int(most or least)))


def deployed(options: Options, replicas: tuple[int, int], drain_s: float = 30.0) -> serve.Application:
    """The application, to be deployed.

    Args:
        replicas: fewest and most.
        drain_s: seconds that a replica has at its end for requests that are in work.
    """
    options = replace(options, places=list(map(_absolute, options.places)))

    def build() -> FastAPI:
        from gpc_dist import logs
        from gpc_dist.inference.server.app import make_app
        from gpc_dist.inference.server.service import Service

        logs.configure(0)
        return make_app(Service(options))

    least, most = replicas
    scaling: dict[str, Any] = {"num_replicas": least}
    if most > least:
        limits = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": _BUSY}
        scaling = {"autoscaling_config": AutoscalingConfig(**limits)}
    on_gpu = options.settings.get("engine.device") != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    deployment: Any = serve.deployment(
        serve.ingress(build)(),
        name="adapters",
        max_ongoing_requests=options.queue_rows,  # the replica itself refuses what is too much
        graceful_shutdown_timeout_s=drain_s,
        ray_actor_options={"num_gpus": 1 if on_gpu else 0},
        **scaling,
    )
    return deployment.bind()  # type: ignore[no-any-return]


def run(
    options: Options,
    host: str,
    port: int,
    drain_s: float,
    replicas: tuple[int, int],
    cluster: Mapping[str, Any],
    check_nodes: Callable[[Sequence[Mapping[str, Any]]], None],
) -> int:
    """Serve on a cluster until SIGTERM or Ctrl-C; returns the exit code.

    Args:
        host, port, drain_s: as of `run.run`.
        replicas: fewest and most.
        cluster: options of `ray.init` that enter it.
        check_nodes: refuses the nodes of a cluster that is not to be used.

    Raises:
        UserError: a place has no adapter.
        MachineError: Ray cannot be entered, or the replicas do not start.
    """
    look_at_all(list(map(Place.parse, options.places)))
    stop = StopRequest()
    try:
        ray.init(log_to_driver=False, **cluster)
        check_nodes(ray.nodes())
        stop.listen(*SIGNALS)  # Ray has set handlers of its own
        serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
        serve.run(deployed(options, replicas, drain_s), name=_NAME, route_prefix="/")
        print(f"serving on Ray at http://{host}:{port} (see http://{host}:{port}/docs)", flush=True)
        while stop.signal is None:
            time.sleep(_POLL_S)
        serve.delete(_NAME)
        if not serve.status().applications:  # of others, on a cluster that is not ours
            serve.shutdown()
    except (RayError, RuntimeError, ValueError, OSError) as error:
        raise MachineError(f"the replicas do not run on Ray: {one_line(error)}") from None
    finally:
        ray.shutdown()
    return EXIT_DONE


def _absolute(given: str) -> str:
    """A place as a process with another working folder finds it."""
    place = Place.parse(given)
    if not Path(place.text).exists():
        return given
    text = str(Path(place.text).absolute())
    return text if place.name is None else f"{place.name}={text}"
