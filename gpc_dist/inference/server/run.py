"""One process that serves, on one machine: `gpc-dist serve`."""

from __future__ import annotations

import signal
import socket
from types import FrameType

import uvicorn

from gpc_dist.errors import EXIT_DONE, MachineError
from gpc_dist.inference.server.app import make_app
from gpc_dist.inference.server.options import Options
from gpc_dist.inference.server.service import Service


def run(options: Options, host: str, port: int, drain_s: float) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code.

    Args:
        host: name or address of the interface to listen on.
        port: 0 for any that is free.
        drain_s: seconds in which requests that have been taken up are answered at the end.

    Raises:
        UserError: see `Service`.
        MachineError: nothing can listen there.
    """
    with _listening(host, port) as listener:
        service = Service(options)
        config = uvicorn.Config(
            make_app(service),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(drain_s)),
        )
        server = uvicorn.Server(config)

        def stop(_: int, __: FrameType | None) -> None:
            server.should_exit = True

        # uvicorn has handlers of its own while it runs, and raises the signals again when it has ended
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        print(f"serving {len(service.catalog.held)} adapters at {address} (see {address}/docs)", flush=True)
        server.run([listener])
    return EXIT_DONE


def _listening(host: str, port: int) -> socket.socket:
    """A socket that keeps clients waiting until they are answered."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise MachineError(
            f"cannot listen at {host}, port {port} ({error}): give others with --host and --port"
        ) from None
