"""The Ray of a search: its own, found where it is said to be, and stopped from the first moment on."""

from __future__ import annotations

import os
import signal
import stat
import threading
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import ray
from packaging.requirements import Requirement

from gpc_dist import cli, locks
from gpc_dist.errors import EXIT_ENVIRONMENT, EXIT_STOPPED, MachineError
from gpc_dist.runs.folder import SearchFolder
from gpc_dist.search import node, ray_cluster, spec
from gpc_dist.training.stop import StopRequest
from tests import rays
from tests.processes import TIMEOUT_S, command, free_port, start_call

pytestmark = pytest.mark.ray

SEARCH = """
recipe: {recipe}
space: {{train.lr: [0.01, 0.02]}}
algorithm: grid
tracking: {{enabled: false}}
resources: {{pack: 2}}
"""


@pytest.fixture
def search(tmp_path: Path, tiny_recipe: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(SEARCH.format(recipe=tiny_recipe))
    return path


def test_the_folder_to_which_ray_lets_everybody_write_is_in_one_that_nobody_enters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "known")
    with ray_cluster._own() as options:
        own, inner = Path(options["_temp_dir"]).parent, Path(options["_temp_dir"]).name
        assert stat.S_IMODE(own.stat().st_mode) == 0o700
        assert len(f"{own}/{inner}/session_2026-01-01_00-00-00_123456_4194304/sockets/plasma_store") <= 107
        ray_cluster._remove_left(own.parent)
        assert own.exists()
    assert not own.exists()


def test_what_a_killed_search_has_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    """Nothing else: neither what is in use, nor what others can enter, nor what holds no lock."""
    folders = {name: tmp_path / f"gpc-ray-{name}" for name in ("dead", "alive", "open", "other")}
    for name, folder in folders.items():
        folder.mkdir(mode=0o755 if name == "open" else 0o700)
        if name != "other":
            (folder / ".lock").touch()
    with locks.hold(folders["alive"] / ".lock"):
        ray_cluster._remove_left(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gpc-ray-alive",
        "gpc-ray-open",
        "gpc-ray-other",
    ]


def enter(folder: Path) -> int:
    """What a search does first."""
    with ray_cluster.connected([SearchFolder(folder)], StopRequest()):
        print("entered")
    return 0


def lose(folder: Path, address: str) -> int:
    """A search that waits for what its Ray has begun."""
    ray_cluster._LOST_S = ray_cluster._PERIOD_S = 0.05
    SearchFolder(folder).write_status("running")
    with ray_cluster._watched(address, [SearchFolder(folder)]):
        threading.Event().wait()
    return 0


def test_a_search_whose_ray_is_lost_ends_and_says_so(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    lost = start_call(lose, tmp_path, address)
    assert lost.wait() == EXIT_ENVIRONMENT
    (line,) = lost.stderr.splitlines()
    assert line.startswith(f"gpc-dist: error: the Ray at {address} has not answered for ")
    assert line.endswith(f"go on with gpc-dist tune {tmp_path}/search.yaml --resume")
    status = SearchFolder(tmp_path).read_status()
    assert status.state == "failed"
    assert line.endswith(status.reason)


def test_a_ray_that_anybody_may_enter_is_refused(
    search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless its user says that there is to be no token."""
    told = "asks for no token: whoever reaches it can run code as its user"
    with rays.ray_cluster(asks=False) as environment:
        monkeypatch.setenv("RAY_ADDRESS", environment["RAY_ADDRESS"])
        done = command("tune", search, cwd=tmp_path)
        assert done.returncode == EXIT_ENVIRONMENT, done.stderr
        assert f"{told}. Start it with RAY_AUTH_MODE=token and a RAY_AUTH_TOKEN" in done.stderr
        assert not (tmp_path / "searches" / "mine" / "trials").exists()
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        done = start_call(enter, tmp_path)
        assert done.wait() == 0, done.stderr
        assert done.stdout == "entered\n"
        assert f"{told}, as RAY_AUTH_MODE=disabled says" in done.stderr


@pytest.mark.parametrize(
    ("secret", "reason"),
    [
        ({}, "no authentication token was found"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, "Failed to connect to Ray cluster"),
    ],
)
def test_a_ray_that_knows_another_token_is_one_line(
    search: Path, shared_ray: dict[str, str], tmp_path: Path, secret: dict[str, str], reason: str
) -> None:
    mine = {
        "RAY_AUTH_MODE": "token",
        "RAY_ADDRESS": shared_ray["RAY_ADDRESS"],
        "HOME": str(tmp_path),
    } | secret
    done = command("tune", search, cwd=tmp_path, **mine, RAY_NUM_REDIS_GET_RETRIES="1")
    assert done.returncode == EXIT_ENVIRONMENT, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "cannot be entered" in line]
    assert reason in line
    assert line.endswith("; give the RAY_AUTH_MODE and RAY_AUTH_TOKEN that it was started with")


def test_a_search_starts_no_ray_without_a_token(
    search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert cli.main(["tune", str(search)]) == EXIT_ENVIRONMENT
    assert (
        "RAY_AUTH_MODE is 'disabled', and the Ray of a search answers nobody without"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "given",
    [{}, {"RAY_AUTH_TOKEN": "1"}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "no", "RAY_AUTH_TOKEN": "1"}],
)
def test_a_node_of_a_job_starts_no_ray_without_a_token(
    search: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(
        MachineError, match="start them by slurm/tune.sbatch, which makes one, or export RAY_AUTH_MODE"
    ):
        node.run_node(spec.load(str(search)), ["tune", str(search)], StopRequest())


def test_versions_of_ray_without_tokens_are_out_of_range() -> None:
    wanted = [Requirement(text) for text in requires("gpc-dist") or []]
    of_ray = [each for each in wanted if each.name == "ray"]
    assert of_ray
    assert not any(each.specifier.contains("2.58.0") for each in of_ray)


def test_nobody_at_the_address(
    search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cli.main(["tune", str(search)]) == EXIT_ENVIRONMENT
    said = capsys.readouterr().err
    assert f"nothing answers at RAY_ADDRESS {address}: start Ray there, or unset RAY_ADDRESS" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_search_that_is_stopped_while_ray_starts_says_so(
    search: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    """By a signal to this process: while Ray starts, in another thread, Python's own handlers are not set."""
    heard, handle = threading.Event(), StopRequest._handle

    def handle_and_note(self: StopRequest, number: int, frame: Any) -> None:
        handle(self, number, frame)
        heard.set()

    def start_slowly(*_: Any, **__: Any) -> None:
        assert signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler)
        os.kill(os.getpid(), number)
        assert heard.wait(TIMEOUT_S)

    for name, value in (ray_cluster._SETTINGS | {"RAY_AUTH_TOKEN": "known"}).items():
        monkeypatch.setenv(name, value)  # which the search would leave behind
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StopRequest, "_handle", handle_and_note)
    monkeypatch.setattr(ray, "init", start_slowly)
    monkeypatch.setattr(ray_cluster, "_wait_for_nodes", lambda: None)
    monkeypatch.setattr(ray_cluster, "_head", lambda: f"127.0.0.1:{free_port()}")
    assert cli.main(["tune", str(search)]) == EXIT_STOPPED
    assert f"stopped by {number.name}; go on with gpc-dist tune" in capsys.readouterr().err
