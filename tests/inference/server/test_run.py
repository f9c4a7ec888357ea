"""The command: it starts, answers, and ends when it is told to, with what is in work answered."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpc_dist.errors import EXIT_ENVIRONMENT, EXIT_USAGE
from tests.conftest import gpc
from tests.inference.server.made import ROWS
from tests.inference.server.servers import CPU, post, started
from tests.processes import wait_until

pytestmark = pytest.mark.slow


def test_what_is_in_work_is_answered_before_the_end(adapters: dict[str, Path], tmp_path: Path) -> None:
    words = (adapters["late"], f"mine={adapters['gated']}", "--port", 0)
    with started(*words, held=tmp_path) as (server, address), ThreadPoolExecutor() as clients:
        asked = [clients.submit(post, address, "late", {"row": "a cat"}) for _ in range(3)]
        asked.append(clients.submit(post, address, "mine", {"row": ROWS["pair"][0]}))
        wait_until((tmp_path / "running").exists)
        with urllib.request.urlopen(f"{address}/metrics") as reply:  # it answers while passes run
            assert b"gpc_dist_rows_in_work" in reply.read()
        wait_until(
            lambda: b"gpc_dist_rows_in_work 4.0" in urllib.request.urlopen(f"{address}/metrics").read()
        )
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
    shutil.copytree(adapters["late"], tmp_path / "one")
    token = {"Authorization": "Bearer s3cret"}
    with started(tmp_path, "--port", 0, "--reload", 0.1, GPC_DIST_SERVE_TOKEN="s3cret") as (server, address):
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(address, "one", {"row": "a cat"})
        assert refused.value.code == 401
        first = post(address, "one", {"row": "a cat"}, **token)
        shutil.copytree(adapters["deep"], tmp_path / "two")

        def there() -> bool:
            request = urllib.request.Request(f"{address}/v1/adapters", headers=token)
            return b'"two"' in urllib.request.urlopen(request).read()

        wait_until(there)
        assert post(address, "one", {"row": "a cat"}, **token) == first
        server.send_signal(signal.SIGINT)  # Ctrl-C
        assert server.wait() == 0
        assert "s3cret" not in server.stdout + server.stderr


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--reload", "0", "invalid period value: '0'"),
        ("--timeout-s", "0", "invalid period value: '0'"),
        ("--host", "", "invalid interface value: ''"),  # sockets take it for every interface
    ],
)
def test_a_period_of_none_and_a_host_of_none_are_refused(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpc("serve", "late", option, value)
    assert f"argument {option}: {said}" in capsys.readouterr().err


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
