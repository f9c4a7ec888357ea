"""Compiled code is kept where nobody else can put any."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from gpc_dist import own_folders
from gpc_dist.encoder import sharding
from tests.processes import start_call

NAMES = ("TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files, in a job that has named no caches."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "environ", {"SLURM_JOB_ID": "12"})
    return tmp_path


keep_compiled_code = own_folders.keep_compiled_code.__wrapped__
"""As in a process that has not called it."""


def shared(place: Path) -> Path:
    return place / f"gpc-dist-cache-{os.geteuid()}"


def test_the_processes_of_a_user_share_a_folder_that_nobody_else_enters(place: Path) -> None:
    for _ in range(2):
        os.environ.clear()
        os.environ["SLURM_JOB_ID"] = "12"
        tempfile.tempdir = str(place)
        keep_compiled_code()
        folders = [Path(os.environ[name]) for name in NAMES]
        assert folders == [shared(place) / name for name in ("inductor", "extensions", "triton")]
        assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(shared(place))
    assert stat.S_IMODE(shared(place).stat().st_mode) == 0o700


def test_outside_of_a_job_home_folders_serve(place: Path) -> None:
    del os.environ["SLURM_JOB_ID"]
    keep_compiled_code()
    assert os.environ.keys() & set(NAMES) == {"TORCHINDUCTOR_CACHE_DIR"}


def test_a_folder_that_the_user_named_is_used(place: Path) -> None:
    os.environ.update(dict.fromkeys(NAMES, "/mine"))
    keep_compiled_code()
    assert {os.environ[name] for name in NAMES} == {"/mine"}


def compile_in(place: Path) -> None:
    """What inductor would use in a process that has imported torch already."""
    from torch._inductor.runtime.runtime_utils import cache_dir

    tempfile.tempdir = None
    os.environ["TMPDIR"] = str(place)
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    theirs = [cache_dir()]
    own_folders.keep_compiled_code()
    from torch._inductor.codecache import _HEADER_DIR

    print(*theirs, cache_dir(), _HEADER_DIR)


@pytest.mark.slow
def test_torch_compiles_there(tmp_path: Path) -> None:
    done = start_call(compile_in, tmp_path)
    assert done.wait() == 0, done.stderr
    before, *after = map(Path, done.stdout.split())
    assert before.parent == tmp_path
    assert all(path.is_relative_to(shared(tmp_path)) for path in after), after


def open_to_others(planted: Path) -> None:
    planted.mkdir()
    planted.chmod(0o770)


def link(planted: Path) -> None:
    (planted.parent / "elsewhere").mkdir(mode=0o700)
    planted.symlink_to(planted.parent / "elsewhere")


def another_users(planted: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    planted.mkdir(mode=0o700)
    os.chown(planted, 12345, 12345)


COMPILE = """
import os
from pathlib import Path
from gpc_dist import own_folders
own_folders.keep_compiled_code()
folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
folder.mkdir()
print(oct(folder.parent.stat().st_mode)[-3:], folder.parent)
"""


@pytest.mark.parametrize("plant", [open_to_others, link, another_users, Path.touch])
def test_a_folder_that_was_there_is_not_used(tmp_path: Path, plant: Callable[[Path], None]) -> None:
    plant(shared(tmp_path))
    before = set(tmp_path.rglob("*"))
    unnamed = {name: value for name, value in os.environ.items() if name not in NAMES}
    words, place = [sys.executable, "-P", "-c", COMPILE], {"TMPDIR": str(tmp_path)}
    done = subprocess.run(words, env=unnamed | place, capture_output=True, text=True, check=True)
    mode, used = done.stdout.split()
    assert mode == "700"
    assert Path(used).parent == tmp_path
    assert Path(used) not in before
    assert f"{shared(tmp_path)} is not a folder of yours" in done.stderr
    assert set(tmp_path.rglob("*")) == before  # its own has gone with the process


def test_each_rank_swaps_to_a_folder_of_its_own(tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(drive)}}}
    swaps = [sharding._with_own_swap_folder(config) for _ in range(2)]
    folders = [Path(each["zero_optimization"]["offload_param"]["nvme_path"]) for each in swaps]
    assert folders[0] != folders[1]
    for folder in folders:
        assert folder.parent == drive
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert config["zero_optimization"]["offload_param"]["nvme_path"] == str(drive)
    for values in ({"offload_param": {"device": "cpu"}}, {}):
        assert sharding._with_own_swap_folder({"zero_optimization": values}) == {"zero_optimization": values}
