"""The Ray of a search: its own, found where it is said to be, and stopped from the first moment on."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from packaging.requirements import Requirement

from gpc_dist import cli
from gpc_dist.errors import EXIT_ENVIRONMENT, EXIT_STOPPED, MachineError
from gpc_dist.search import node, ray_cluster, spec
from gpc_dist.training.stop import StopRequest
from tests import rays
from tests.holds import Hold
from tests.processes import TIMEOUT_S, command, free_port, start, start_call, wait_until

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


def test_a_local_search_leaves_nothing_outside_its_folder(search: Path, tmp_path: Path) -> None:
    """With a folder for temporary files whose path is too long for Ray's sockets, and nothing set for Ray."""
    home, temporary = tmp_path / "home", tmp_path / ("long" * 20)
    home.mkdir()
    temporary.mkdir()
    before = set(Path("/tmp").glob("gpc-ray-*"))
    hold = Hold(tmp_path / "searches" / "mine" / "trials" / "000", 6)
    done = start("tune", search, cwd=tmp_path, HOME=str(home), TMPDIR=str(temporary))
    hold.wait(lambda: done.stdout + done.stderr)
    refused_without_the_token(done.pid, tmp_path)
    hold.release()
    assert done.wait() == 0, done.stdout + done.stderr
    assert not [path for path in home.rglob("*") if "ray" in path.name or "token" in path.name]
    assert not list(temporary.iterdir())
    assert set(Path("/tmp").glob("gpc-ray-*")) <= before
    # one name and one metric for a trial, from the table to the last line
    *_, best = [line for line in done.stdout.splitlines() if line.startswith("best of 2 trials: ")]
    name, value = best.split(": ")[1].split(", accuracy ")
    assert f"best accuracy {value} by {name};" in done.stdout
    assert "2 of 2 trials ended" in done.stdout


def test_the_folder_to_which_ray_lets_everybody_write_is_in_one_that_nobody_enters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "known")
    with ray_cluster._own() as options:
        own, inner = Path(options["_temp_dir"]).parent, Path(options["_temp_dir"]).name
        assert stat.S_IMODE(own.stat().st_mode) == 0o700
        assert len(f"{own}/{inner}/session_2026-01-01_00-00-00_123456_4194304/sockets/plasma_store") <= 107
    assert not own.exists()


CLIENT = """
import sys
import ray
from ray._raylet import GcsClient

for enter in (lambda: GcsClient(address=sys.argv[1]).internal_kv_keys(b""), lambda: ray.init(address=sys.argv[1])):
    try:
        enter()
        print("entered")
    except Exception as error:
        print(type(error).__name__)
"""


def refused_without_the_token(driver: int, home: Path) -> None:
    """As any process of this machine: the cluster's store is asked, and a driver tries to enter."""
    (store,) = [
        each for each in psutil.Process(driver).children(recursive=True) if each.name() == "gcs_server"
    ]
    port = min(each.laddr.port for each in store.net_connections() if each.status == psutil.CONN_LISTEN)
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    without |= {"HOME": str(home), "RAY_NUM_REDIS_GET_RETRIES": "1"}
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, f"127.0.0.1:{port}"],
            env=without | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for more in ({}, wrong)
    ]
    said = [client.communicate(timeout=TIMEOUT_S)[0].split() for client in clients]
    assert said == [["AuthenticationError", "ConnectionError"]] * 2


def enter(folder: Path) -> int:
    """What a search does first."""
    with ray_cluster.connected(folder, StopRequest()):
        print("entered")
    return 0


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
    (ray_of_ours,) = [each for each in wanted if each.name == "ray"]
    assert not ray_of_ours.specifier.contains("2.58.0")


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


def tune_with_slow_start(words: list[str], note: Path) -> int:
    """`gpc-dist tune` whose Ray starts when `note` is gone."""

    def slow(*_: Any, **__: Any) -> None:
        note.touch()
        while note.exists():
            time.sleep(0.01)

    ray.init, ray_cluster._wait_for_nodes = slow, lambda: None
    return cli.main(["tune", *words])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_search_that_is_stopped_while_ray_starts_says_so(
    search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.chdir(tmp_path)
    note = tmp_path / "note"
    driver = start_call(tune_with_slow_start, [str(search)], note)
    wait_until(note.exists, failed=lambda: driver.stdout + driver.stderr)
    driver.send_signal(number)
    note.unlink()
    assert driver.wait() == EXIT_STOPPED, driver.stdout + driver.stderr
    assert f"stopped by {number.name}; go on with: gpc-dist tune" in driver.stderr
