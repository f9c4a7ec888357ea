"""Servers in processes of their own, as the command starts them."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpc_dist import cli
from gpc_dist.inference.server.encoder import SharedEncoder
from tests.processes import TIMEOUT_S, Started, start_call, wait_until

CPU = ("--engine.device", "cpu")


def serve(words: list[str], held: str = "") -> int:
    """`gpc-dist serve`; its passes wait for a file, and say that they do by another."""
    if held:
        run = SharedEncoder.run

        def wait(self: SharedEncoder, rows: Any) -> Any:
            Path(held, "running").touch()
            while not Path(held, "go").exists():
                time.sleep(0.01)
            return run(self, rows)

        SharedEncoder.run = wait  # type: ignore[method-assign]
    return cli.main(["serve", *words, *CPU])


@contextmanager
def started(*words: object, held: Path | str = "", **environment: str) -> Iterator[tuple[Started, str]]:
    """A server, and its address."""
    server = start_call(serve, list(map(str, words)), str(held), **environment)
    try:
        wait_until(lambda: "http://" in server.stdout or server.returncode is not None)
        found = re.search(r"at (http://\S+)", server.stdout)
        assert found, server.stderr
        yield server, found[1]
    finally:
        server.kill()
        server.wait()


def post(address: str, name: str, tree: Any, **headers: str) -> Any:
    request = urllib.request.Request(
        f"{address}/v1/adapters/{name}/predict", json.dumps(tree).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
        return json.load(reply)["predictions"]
