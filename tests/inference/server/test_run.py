"""The command: it starts, answers, and ends when it is told to, with what is in work answered."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpc_dist import cli
from gpc_dist.errors import EXIT_ENVIRONMENT, EXIT_USAGE
from gpc_dist.inference.server.encoder import SharedEncoder
from gpc_dist.inference.server.options import TOKEN
from tests.conftest import gpc
from tests.inference.server.made import ROWS
from tests.processes import TIMEOUT_S, Started, start_call, wait_until
from tests.rays import ray_cluster

pytestmark = pytest.mark.slow
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


def test_what_is_in_work_is_answered_before_the_end(adapters: dict[str, Path], tmp_path: Path) -> None:
    words = (adapters["late"], f"mine={adapters['gated']}", "--port", 0)
    with started(*words, held=tmp_path) as (server, address), ThreadPoolExecutor() as clients:
        asked = [clients.submit(post, address, "late", {"row": "a cat"}) for _ in range(3)]
        asked.append(clients.submit(post, address, "mine", {"row": ROWS["pair"][0]}))
        wait_until((tmp_path / "running").exists)
        with urllib.request.urlopen(f"{address}/metrics") as reply:  # it answers while passes run
            assert b"gpc_dist_rows_in_work" in reply.read()
        wait_until(lambda: b"gpc_dist_rows_in_work 4.0" in urllib.request.urlopen(f"{address}/metrics").read())
        server.send_signal(signal.SIGTERM)
        host, port = re.fullmatch(r"http://(.+):(\d+)", address).groups()  # type: ignore[union-attr]

        def closed() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex((host, int(port))) != 0

        wait_until(closed)
        (tmp_path / "go").touch()
        assert [len(each.result()) for each in asked] == [1] * 4
        assert server.wait() == 0, server.stderr
        assert host == "127.0.0.1"


def test_new_versions_are_taken_up_and_the_token_is_asked_for(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(adapters["late"], tmp_path / "one")
    token = {"Authorization": "Bearer s3cret"}
    with started(tmp_path, "--port", 0, "--reload", 0.1, GPC_DIST_SERVE_TOKEN="s3cret") as (server, address):
        with pytest.raises(urllib.request.HTTPError) as refused:
            post(address, "one", {"row": "a cat"})
        assert refused.value.code == 401
        first = post(address, "one", {"row": "a cat"}, **token)
        shutil.copytree(adapters["deep"], tmp_path / "two")

        def there() -> bool:
            request = urllib.request.Request(f"{address}/v1/adapters", headers=token)
            return b'"two"' in urllib.request.urlopen(request).read()

        wait_until(there)
        assert post(address, "one", {"row": "a cat"}, **token) == first
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert "s3cret" not in server.stdout + server.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nowhere"], EXIT_USAGE, "there is no folder nowhere"),
        (["late", "--train.lr", "1"], EXIT_USAGE, "--train.lr is each adapter's own"),
        (["late", "--port", "65536"], EXIT_ENVIRONMENT, "cannot listen at 127.0.0.1, port 65536"),
    ],
)
def test_what_cannot_be_served_ends_with_a_line(
    adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(adapters["late"].parent)
    assert gpc("serve", *words, *CPU) == code
    assert said in capsys.readouterr().err


@pytest.mark.ray
def test_replicas_on_ray_serve_answer(adapters: dict[str, Path]) -> None:
    from tests.processes import free_port

    with ray_cluster() as environment:
        words = (adapters["late"], "--port", free_port(), "--replicas", "1-2")
        with started(*words, **environment, **{TOKEN: "s3cret"}) as (server, address):
            token = {"Authorization": "Bearer s3cret"}
            found = post(address, "late", {"rows": ["a cat", "a dog"]}, **token)
            assert [each["id"] for each in found] == [0, 1]
            with pytest.raises(urllib.request.HTTPError) as refused:
                post(address, "late", {"row": "a cat"})
            assert refused.value.code == 401
            server.send_signal(signal.SIGTERM)
            assert server.wait() == 0, server.stderr
