"""`gpc-dist serve`."""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

from gpc_dist.commands.command import Command, count
from gpc_dist.errors import MachineError, UserError

_SECTIONS = ("encoder.", "engine.", "tracking.uri")
"""What settings of a recipe may say here: the others are each adapter's own."""


def seconds(text: str) -> float:
    """Argument type: seconds or milliseconds, 0 or more."""
    number = float(text)
    if not 0 <= number < 1e6:
        raise ValueError
    return number


def period(text: str) -> float:
    """Argument type: seconds, more than 0."""
    if not (number := seconds(text)):
        raise ValueError
    return number


def interface(text: str) -> str:
    """Argument type: a name or an address. None at all would be every interface of the machine."""
    if not text.strip():
        raise ValueError
    return text


def replicas(text: str) -> tuple[int, int]:
    """Argument type: `2`, or a range such as `1-8`."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if found is None:
        raise ValueError
    least, most = int(found[1]), int(found[2] or found[1])
    if not 1 <= least <= most:
        raise ValueError
    return least, most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("places", metavar="ADAPTER", nargs="+", help="PLACE or NAME=PLACE, see above")
    parser.add_argument(
        "--host",
        type=interface,
        default="127.0.0.1",
        help="where to listen [127.0.0.1: this machine alone]",
    )
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free [8000]")
    parser.add_argument(
        "--reload",
        metavar="S",
        type=period,
        help="look at the places again every S seconds, and take up what is new",
    )
    parser.add_argument(
        "--wait-ms",
        metavar="MS",
        type=seconds,
        default=5.0,
        help="how long a row may wait for others to share its pass [5]",
    )
    parser.add_argument(
        "--batch-tokens",
        metavar="N",
        type=count,
        help="most tokens of a pass, prompts and padding included [256; on a GPU 16384]",
    )
    parser.add_argument(
        "--queue", metavar="N", type=count, default=1024, help="rows in work; more are refused [1024]"
    )
    parser.add_argument("--max-rows", metavar="N", type=count, default=128, help="rows of a request [128]")
    parser.add_argument(
        "--max-body-kib", metavar="N", type=count, default=1024, help="size of a request [1024]"
    )
    parser.add_argument("--timeout-s", metavar="S", type=period, default=30.0, help="time for a request [30]")
    parser.add_argument(
        "--drain-s",
        metavar="S",
        type=seconds,
        default=30.0,
        help="time at the end for requests that are in work [30]",
    )
    parser.add_argument(
        "--replicas",
        metavar="N|N-M",
        type=replicas,
        help="on Ray Serve, with so many processes; of a range, as many as the requests need",
    )


def run(options: Any, settings: dict[str, str], _: list[str]) -> int:
    if others := [key for key in settings if not key.startswith(_SECTIONS)]:
        raise UserError(
            f"--{others[0]} is each adapter's own: a server takes settings of the engine and of the encoder"
        )
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MachineError(f"gpc-dist serve needs {error.name}: pip install 'gpc-dist[serve]'") from None
    from gpc_dist.inference.server.options import TOKEN, Options

    given = Options(
        places=options.places,
        settings={key: value for key, value in settings.items() if not key.startswith("tracking.")},
        reload_s=options.reload,
        wait_ms=options.wait_ms,
        batch_tokens=options.batch_tokens,
        queue_rows=options.queue,
        most_rows=options.max_rows,
        most_body_kib=options.max_body_kib,
        timeout_s=options.timeout_s,
        token=os.environ.get(TOKEN) or None,
    )
    if options.replicas is not None:
        return _run_on_ray(given, options)
    from gpc_dist.inference.server.run import run as run_here

    return run_here(given, options.host, options.port, options.drain_s)


def _run_on_ray(given: Any, options: Any) -> int:
    try:
        from gpc_dist.inference.server import ray_serve
    except ImportError as error:
        raise MachineError(f"--replicas needs {error.name}: pip install 'gpc-dist[ray-serve]'") from None
    from gpc_dist.search import ray_cluster, ray_token

    where = (options.host, options.port, options.drain_s)
    with ray_cluster.entrance() as cluster:
        return ray_serve.run(given, *where, options.replicas, cluster, ray_token.check_nodes)


COMMAND = Command(
    "Serve any number of adapters of one encoder over HTTP.",
    add_arguments,
    run,
    "PLACE is the folder of an adapter, of a run or of a search (its best adapter), a folder of such folders, or a\n"
    "model of MLflow (models:/NAME/VERSION, models:/NAME@ALIAS, runs:/ID/MODEL; --tracking.uri). NAME is what\n"
    "requests call the adapter, by default the name of the run, the search or the model.\n\n"
    'POST /v1/adapters/NAME/predict answers {"rows": [...]} as gpc-dist predict would; /docs describes all.\n'
    "Requests to different adapters share passes of the encoder. With GPC_DIST_SERVE_TOKEN in the environment,\n"
    "requests must bring it as bearer token. --replicas needs pip install 'gpc-dist[ray-serve]'.\n\n"
    "example: gpc-dist serve runs/rte runs/boolq sentiment=models:/sst2/3",
    settings="recipe",
)
