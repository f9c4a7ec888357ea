"""Who does not know a job's secret is not believed, and nothing that comes from elsewhere is unpickled."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from gpc_dist import cli
from gpc_dist.config import EngineConfig
from gpc_dist.distributed import launch, messages
from gpc_dist.distributed.world import init_world
from gpc_dist.errors import EXIT_ENVIRONMENT, MachineError
from tests.conftest import losses
from tests.distributed import strangers
from tests.processes import Started, call_on_ranks, free_port, start, start_call, wait_until

pytestmark = pytest.mark.slow

FOREIGN = "does not have the signature of this job"


def listening(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


@pytest.fixture
def start_rank(tiny_recipe: Path, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Starts a rank of two of one job, with a secret; the attribute `port` is that of its store."""
    job = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        launch.SECRET: "known",
    }
    started = []

    def start_one(rank: int, *more: object) -> Started:
        words = ("train", tiny_recipe, "--run.dir", tmp_path / "run", *more)
        started.append(start(*words, RANK=str(rank), **job))
        return started[-1]

    start_one.port = int(job["MASTER_PORT"])  # type: ignore[attr-defined]
    yield start_one
    for each in started:
        each.kill()


def test_what_a_stranger_writes_first_is_not_looked_at(
    start_rank: Any, tiny_recipe: Path, tmp_path: Path
) -> None:
    main = start_rank(0)
    wait_until(lambda: listening(start_rank.port) or main.returncode is not None, failed=lambda: main.stderr)
    assert not listening(start_rank.port, "127.0.0.2")  # at no other address
    stranger = start_call(strangers.write_everywhere, start_rank.port, tmp_path / "trap")
    assert stranger.wait() == 0, stranger.stderr
    other = start_rank(1)
    assert (main.wait(), other.wait()) == (0, 0), main.stderr
    assert len(losses(tmp_path / "run")) == 12
    assert not (tmp_path / "trap").exists()


LISTED = pytest.mark.skipif(
    not hasattr(dist.Store, "list_keys"), reason="this torch does not list the names in a store"
)


@pytest.mark.parametrize(
    ("rank", "way", "message"),
    [
        (1, "pickles", "rank 1 did not come within 3 s"),
        pytest.param(1, "messages", f"as a message of rank 1 {FOREIGN}", marks=LISTED),
        pytest.param(0, "messages", f"as a message of rank 0 {FOREIGN}", marks=LISTED),
    ],
)
def test_a_stranger_in_a_ranks_place_is_refused(
    start_rank: Any, tmp_path: Path, rank: int, way: str, message: str
) -> None:
    def start_stranger() -> Started:
        return start_call(strangers.take_a_place, start_rank.port, tmp_path / "trap", rank, way)

    stranger = start_stranger() if rank == 0 else None
    # with a plan, the first thing that ranks do is to tell rank 0 about their machines
    own = start_rank(1 - rank, "--engine.timeout_s", 3, "--engine.plan", "auto")
    wait_until(lambda: listening(start_rank.port) or own.returncode is not None, failed=lambda: own.stderr)
    stranger = stranger or start_stranger()
    assert own.wait() == EXIT_ENVIRONMENT
    stranger.kill()
    assert message in own.stderr.splitlines()[-1]
    assert "Traceback" not in own.stderr
    assert not (tmp_path / "trap").exists()


def test_where_somebody_listens_already_rank_0_says_so(start_rank: Any) -> None:
    with socket.create_server(("127.0.0.1", start_rank.port)):
        own = start_rank(0)
        assert own.wait() == EXIT_ENVIRONMENT
    assert f"rank 0 of 2 could not join at 127.0.0.1:{start_rank.port}: " in own.stderr.splitlines()[-1]
    assert "Address already in use" in own.stderr


def without_pickles(words: list[str]) -> int:
    def refuse(*_: object) -> None:
        raise AssertionError("pickled")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed_c10d, "_object_to_tensor", refuse)
        patch.setattr(distributed_c10d, "_tensor_to_object", refuse)
        return cli.main(words)


def test_ranks_pickle_nothing(tiny_recipe: Path, tmp_path: Path) -> None:
    """DeepSpeed neither."""
    words = ["train", str(tiny_recipe), "--run.dir", str(tmp_path / "run"), "--engine.zero_stage", "3"]
    done = call_on_ranks(2, without_pickles, words)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 12


def exchange() -> None:
    world = init_world(EngineConfig(device="cpu"))
    rank = world.rank
    value = {"rank": rank, "text": "ä" * 100 * rank, "values": [0.1, None, float("inf")]}
    found = world.gather(value)
    expected = [{**value, "rank": each, "text": "ä" * 100 * each} for each in range(2)]
    assert found == (expected if rank == 0 else None)
    assert world.from_main(f"of {rank}") == "of 0"
    tensors = [
        {},
        {"one": torch.tensor(3), "half": torch.full((2, 3), 0.1).bfloat16(), "none": torch.empty(2, 0)},
    ]
    gathered = world.gather_tensors(tensors[rank])
    if rank == 0:
        assert gathered is not None
        assert [part.keys() for part in gathered] == [part.keys() for part in tensors]
        for name, tensor in tensors[1].items():
            assert torch.equal(gathered[1][name], tensor)
            assert gathered[1][name].dtype == tensor.dtype


def test_values_and_tensors_arrive_as_they_were_sent() -> None:
    done = call_on_ranks(2, exchange)
    assert done.returncode == 0, done.stderr


def refuse_each_other() -> None:
    world = init_world(EngineConfig(device="cpu"))
    key = b"mine"
    for keys, ranks, calls in (
        ((key, b"other"), (0, 1), (0, 0)),  # who does not know the key
        ((key, key), (0, 0), (0, 0)),  # what another rank said
        ((key, key), (0, 1), (0, 1)),  # what was said before
    ):
        own = messages.Messages(ranks[world.rank], 2, world.device, keys[world.rank])
        own._rank = world.rank if ranks == (0, 1) else own._rank
        own._count = calls[world.rank]
        with pytest.raises(MachineError, match=FOREIGN):
            own.gather(b"text")


def test_a_message_is_believed_once_and_of_one_rank() -> None:
    done = call_on_ranks(2, refuse_each_other)
    assert done.returncode == 0, done.stderr


def test_each_start_of_ranks_has_a_secret_of_its_own(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['GPC_DIST_SECRET'], file=open(sys.argv[1] + os.environ['RANK'], 'w'))"
    found = []
    for number in range(2):
        place = str(tmp_path / f"{number}-")
        assert start_call(launch.start_ranks, [sys.executable, "-c", code, place], 2).wait() == 0
        one, other = (Path(place + rank).read_text() for rank in "01")
        assert one == other
        found.append(one)
    assert found[0] != found[1]
    assert all(len(secret.strip()) == 64 for secret in found)
