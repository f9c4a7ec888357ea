"""The Ray of a search: its own, found where it is said to be, and stopped from the first moment on."""

from __future__ import annotations

import signal
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from gpc_dist import cli
from gpc_dist.errors import EXIT_ENVIRONMENT, EXIT_STOPPED
from gpc_dist.search import ray_cluster
from tests.processes import command, free_port, start_call, wait_until

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
    done = command("tune", search, cwd=tmp_path, HOME=str(home), TMPDIR=str(temporary))
    assert done.returncode == 0, done.stdout + done.stderr
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
