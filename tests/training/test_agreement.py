"""Ranks that see different folders, as a file system shows them that is not shared or shows late what was written: they
resume from what rank 0 found, or end together."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpc_dist import cli, config
from gpc_dist.distributed.world import init_world
from gpc_dist.errors import EXIT_USAGE, UserError
from gpc_dist.files import sha256
from gpc_dist.training.pack import Pack
from tests.conftest import losses
from tests.processes import Started, call_on_ranks, start_on_ranks

pytestmark = pytest.mark.slow

NEWEST = "step-00000012"


def train(recipe: Path, place: Path) -> int:
    """On a rank, with a run folder of its own."""
    folder = place / os.environ["RANK"]
    return cli.main(["train", str(recipe), "--run.dir", str(folder), "--train.keep_last", "9"])


def on_both(recipe: Path, place: Path) -> list[Started]:
    """The ranks, when they have ended."""
    ranks = start_on_ranks(2, train, recipe, place)
    for rank in ranks:
        rank.wait()
    return ranks


@pytest.fixture(scope="module")
def finished(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two ranks, with checkpoints of steps 4, 8 and 12."""
    place = tmp_path_factory.mktemp("finished")
    assert [rank.wait() for rank in on_both(tiny_recipe, place)] == [0, 0]
    saved = sorted(path.name for path in (place / "0" / "checkpoints").iterdir())
    assert saved == ["step-00000004", "step-00000008", NEWEST]
    return place / "0"


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder for each rank."""
    for rank in "01":
        shutil.copytree(finished, tmp_path / rank)
    return tmp_path


def state(place: Path, rank: int, name: str = NEWEST) -> Path:
    return place / str(rank) / "checkpoints" / name


def check_undisturbed(place: Path, finished: Path) -> None:
    assert losses(place / "0") == losses(finished)
    mine, theirs = (load_file(state(run, 0) / "trained.safetensors") for run in (place, finished.parent))
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(theirs[name]) for name in mine)


def test_all_resume_from_what_rank_0_found(tiny_recipe: Path, place: Path, finished: Path) -> None:
    shutil.rmtree(state(place, 0))  # the other rank sees a later one
    assert [rank.wait() for rank in on_both(tiny_recipe, place)] == [0, 0]
    check_undisturbed(place, finished)


def test_all_begin_where_rank_0_found_nothing(tiny_recipe: Path, place: Path, finished: Path) -> None:
    shutil.rmtree(place / "0")
    assert [rank.wait() for rank in on_both(tiny_recipe, place)] == [0, 0]
    check_undisturbed(place, finished)


def missing(place: Path) -> None:
    shutil.rmtree(state(place, 1))


def incomplete(place: Path) -> None:
    (state(place, 1) / "COMPLETE").unlink()


def older(place: Path) -> None:
    """What a run that was started again had written there before."""
    shutil.rmtree(state(place, 1))
    shutil.copytree(state(place, 1, "step-00000008"), state(place, 1))


def damaged(place: Path) -> None:
    (state(place, 1) / "trained.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (missing, "which rank 0 found, is not there: all ranks must see the same run folder"),
        (incomplete, "which rank 0 found, is not there: all ranks must see the same run folder"),
        (older, "is not the one that rank 0 found: all ranks must see the same run folder"),
        (damaged, "is damaged (trained.safetensors changed after it was written): delete this folder"),
    ],
)
def test_a_rank_that_cannot_read_it_ends_the_job_on_all(
    tiny_recipe: Path, place: Path, change: Any, reason: str
) -> None:
    change(place)
    before = losses(place / "0")
    for rank in on_both(tiny_recipe, place):
        assert rank.returncode == EXIT_USAGE, rank.stderr
        (line,) = [line for line in rank.stderr.splitlines() if "error" in line]
        assert line.startswith("gpc-dist: error: rank 1 on ")
        assert f"checkpoint {state(place, 1)}" in line
        assert reason in line
    assert losses(place / "0") == before


def test_a_state_that_one_rank_cannot_restore_ends_the_job_on_all(tiny_recipe: Path, place: Path) -> None:
    for rank in (0, 1):
        folder = state(place, rank)
        generators = load_file(folder / "rng.safetensors")
        save_file(generators | {"1": torch.zeros(3, dtype=torch.uint8)}, folder / "rng.safetensors")
        sums = json.loads((folder / "COMPLETE").read_text())
        sums["rng.safetensors"] = sha256(folder / "rng.safetensors")
        (folder / "COMPLETE").write_text(json.dumps(sums))
    for one in on_both(tiny_recipe, place):
        assert one.returncode == EXIT_USAGE, one.stderr
        assert f"rank 1 on {os.uname().nodename}: checkpoint {NEWEST} is damaged (" in one.stderr


def add_to_a_pack(recipe: Path, place: Path) -> None:
    """On a rank: a run that starts from a state that rank 1 does not see is refused, and the next one is trained."""
    settings = config.load(str(recipe), {"run.dir": str(place / "run")})
    world = init_world(settings.engine)
    pack = Pack(settings, world)
    with pytest.raises(UserError, match="rank 1 on .* which rank 0 found, is not there"):
        pack.add("one", settings, ["gpc-dist"], state(place, world.rank))
    assert pack.names == []
    pack.add("one", settings, ["gpc-dist"], state(place, 0, "step-00000008"))
    while pack.names:
        pack.advance(pack.names)
    world.leave()


def test_a_pack_goes_on_without_a_run_whose_start_one_rank_does_not_see(
    tiny_recipe: Path, place: Path, finished: Path
) -> None:
    missing(place)
    done = call_on_ranks(2, add_to_a_pack, tiny_recipe, place)
    assert done.returncode == 0, done.stderr
    assert sorted(losses(place / "run")) == [9, 10, 11, 12]
    late = {step: loss for step, loss in losses(finished).items() if step > 8}
    assert losses(place / "run") == pytest.approx(late, rel=1e-5)
