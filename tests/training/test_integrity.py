"""One bit flips in the memory of one rank, as failing memory flips it: the run ends before anything is saved of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gpc_dist import cli, config
from gpc_dist.distributed.world import World, init_world
from gpc_dist.errors import EXIT_ENVIRONMENT, AlteredError
from gpc_dist.training.integrity import bit_sum, minority, verdict
from gpc_dist.training.pack import Pack
from gpc_dist.training.run import Run
from tests.conftest import losses
from tests.processes import on_ranks, start_on_ranks

WEIGHT = "encoder.layer.2.attention.self.query.weight"

LATE = ("--adapter.first_layer", "1")


def flip(tensor: torch.Tensor, bit: int) -> None:
    """Flip one bit of a tensor's bytes, in place."""
    octets = tensor.detach().view(-1).view(torch.uint8)
    octets[bit // 8] ^= 1 << bit % 8


# -- sums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.bool])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_sum_changes_with_every_bit(dtype: torch.dtype, start: int) -> None:
    tensor = torch.zeros(40, dtype=dtype)[start : start + 13]
    before = int(bit_sum(tensor))
    for bit in range(8 * tensor.numel() * dtype.itemsize):
        flip(tensor, bit)
        assert int(bit_sum(tensor)) != before, bit
        flip(tensor, bit)
    assert int(bit_sum(tensor)) == before


def test_small_and_odd_tensors_have_sums() -> None:
    assert int(bit_sum(torch.empty(0))) == 0
    assert int(bit_sum(torch.tensor(3, dtype=torch.uint8))) == 3
    across = torch.arange(6.0).view(2, 3).T
    assert int(bit_sum(across)) == int(bit_sum(across.contiguous()))


@pytest.mark.parametrize(
    ("values", "odd"),
    [("a", []), ("aa", []), ("ab", [0, 1]), ("aba", [1]), ("baaca", [0, 3]), ("aabb", [0, 1, 2, 3])],
)
def test_a_minority_is_named_where_there_is_one(values: str, odd: list[int]) -> None:
    assert minority(values) == odd


def found(**other: str) -> list[dict[str, Any]]:
    """What three ranks found, the second one something else."""
    same = {"host": "a", "changed": "", "frozen": "1", "adapter": "2"}
    return [same, same | {"host": "b"} | other, same]


def test_a_verdict_names_ranks_and_hosts() -> None:
    assert verdict(found()) == ""
    assert verdict(found(changed="w", frozen="0")) == "frozen weight 'w' changed in the memory of rank 1 on b"
    assert (
        verdict(found(frozen="0")) == "the frozen weights differ on rank 1 on b from that of the other ranks"
    )
    assert verdict(found(adapter="0")) == "the adapter differs on rank 1 on b from that of the other ranks"
    assert verdict(found(adapter="0")[:2]) == (
        "the adapter differs between rank 0 on a, rank 1 on b, and no majority says which is right"
    )


# -- runs --------------------------------------------------------------------------------------------------------


def weight(run: Run) -> torch.Tensor:
    return dict(run.session.model.encoder.named_parameters())[WEIGHT]


FLIPS = {
    "weight": weight,
    "shard": lambda run: weight(run).ds_tensor,
    "table": lambda run: run.session.model.token_embeddings.weight,
    "below": lambda run: next(run.session.text_states.modules.parameters()),
    "adapter": lambda run: next(run.adapter.parameters()),
    "moment": lambda run: next(iter(run.optimizer.inner.state.values()))["exp_avg_sq"],
}


def flip_at(step: int, rank: int, what: str) -> None:
    """On a rank: flip a bit before a step, if it is that rank."""
    begin_step, ranks = Run.begin_step, [rank]

    def flip_and_begin(run: Run) -> None:
        if run.position.step + 1 == step and int(os.environ["RANK"]) in ranks:
            ranks.clear()  # once in a pack
            flip(FLIPS[what](run), 3)  # of the fraction, far behind the point
        begin_step(run)

    Run.begin_step = flip_and_begin


def train_with_flip(words: list[str], *where: Any) -> int:
    flip_at(*where)
    return cli.main(words)


def words(recipe: Path, folder: Path, stage: int, *more: object) -> list[str]:
    return [*map(str, ("train", recipe, "--run.dir", folder, "--engine.zero_stage", stage, *more))]


def disturb(recipe: Path, folder: Path, ranks: int, stage: int, what: str, *more: object) -> list[str]:
    """Train until a bit that flips on rank 1 before step 6 ends the run; returns the error of each rank."""
    given = words(recipe, folder, stage, *more)
    started = start_on_ranks(ranks, train_with_flip, given, 6, 1, what)
    assert [each.wait() for each in started] == [EXIT_ENVIRONMENT] * ranks, started[0].stderr
    return [line for each in started for line in each.stderr.splitlines() if "error" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stage", "what", "more", "said"),
    [
        (
            2,
            0,
            "weight",
            ("--engine.quantize", "int8"),
            f"frozen weight 'encoder.{WEIGHT}' changed in the memory of",
        ),
        (2, 0, "weight", LATE, "changed in the memory of rank 1 on "),
        (2, 0, "below", (*LATE, "--engine.state_cache", "none"), "changed in the memory of rank 1 on "),
        (2, 3, "shard", ("--engine.quantize", "int8"), f"frozen weight 'encoder.{WEIGHT}/shard' changed in"),
        (2, 3, "table", (), "frozen weight 'token_embeddings.weight' changed in the memory of rank 1 on "),
        (3, 0, "moment", (), "the adapter differs on rank 1 on "),
        (2, 0, "adapter", (), "the adapter differs between rank 0 on "),
    ],
)
def test_a_flipped_bit_ends_the_run(
    tiny_recipe: Path, tmp_path: Path, ranks: int, stage: int, what: str, more: tuple[str, ...], said: str
) -> None:
    found = disturb(tiny_recipe, tmp_path / "run", ranks, stage, what, *more)
    assert len(found) == ranks
    assert all(said in line for line in found), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stage", "what", "said"),
    [
        (2, 0, "weight", f"frozen weight 'encoder.{WEIGHT}' changed in the memory of rank 1 on "),
        (2, 3, "shard", f"frozen weight 'encoder.{WEIGHT}/shard' changed in the memory of rank 1 on "),
        (3, 0, "adapter", "the adapter differs on rank 1 on "),
    ],
)
def test_nothing_is_saved_of_it_and_the_run_goes_on_from_before(
    tiny_recipe: Path, tmp_path: Path, ranks: int, stage: int, what: str, said: str
) -> None:
    folder, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    for line in disturb(tiny_recipe, folder, ranks, stage, what):
        assert said in line
        assert f"goes on from {checkpoints / 'step-00000004'}" in line
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000004"]
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    assert max(losses(folder)) == 8  # when it was found
    saved = load_file(checkpoints / "step-00000004" / "trained.safetensors")
    best = load_file(folder / "adapter" / "adapter.safetensors")
    assert all(tensor.equal(saved[f"param/{name}"]) for name, tensor in best.items())

    for each in (folder, tmp_path / "undisturbed"):
        done = on_ranks(ranks, *words(tiny_recipe, each, stage))
        assert done.returncode == 0, done.stderr
    assert losses(folder) == losses(tmp_path / "undisturbed")
    mine, theirs = (
        load_file(each / "checkpoints" / "step-00000012" / "trained.safetensors")
        for each in (folder, tmp_path / "undisturbed")
    )
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(theirs[name]) for name in mine)


@pytest.mark.slow
def test_ranks_that_read_other_weights_do_not_begin(tiny_recipe: Path, tmp_path: Path) -> None:
    started = start_on_ranks(3, train_with_other_weights, words(tiny_recipe, tmp_path / "run", 0))
    assert [each.wait() for each in started] == [EXIT_ENVIRONMENT] * 3
    assert "the frozen weights differ on rank 2 on " in started[0].stderr
    assert "the same command starts again" in started[0].stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def train_with_other_weights(words: list[str]) -> int:
    """On a rank: the last one has read a bit wrongly."""
    from gpc_dist.training import train

    open_session = train.open_session

    def open_and_flip(*arguments: Any) -> Any:
        session = open_session(*arguments)
        if os.environ["RANK"] == "2":
            flip(dict(session.model.encoder.named_parameters())[WEIGHT], 3)
        return session

    train.open_session = open_and_flip
    return cli.main(words)


@pytest.mark.slow
def test_a_pack_saves_none_of_its_runs_with_a_changed_encoder(tiny_recipe: Path, tmp_path: Path) -> None:
    started = start_on_ranks(2, pack_with_flip, tiny_recipe, tmp_path)
    assert [each.wait() for each in started] == [0, 0], started[0].stderr
    for name in ("one", "two"):
        assert [path.name for path in (tmp_path / name / "checkpoints").iterdir()] == ["step-00000004"]


def pack_with_flip(recipe: Path, place: Path) -> None:
    """On a rank: two runs in a pack, and a bit flips in the encoder."""
    flip_at(6, 1, "weight")
    configs = {name: config.load(str(recipe), {"run.dir": str(place / name)}) for name in ("one", "two")}
    world: World = init_world(configs["one"].engine)
    pack = Pack(configs["one"], world)
    for name, settings in configs.items():
        pack.add(name, settings, ["gpc-dist"])
    pack.advance(pack.names)
    with pytest.raises(AlteredError, match="in the memory of rank 1 on .* goes on from .*step-00000004"):
        pack.advance(pack.names)
    for name in configs:
        with pytest.raises(AlteredError):
            pack.save(name)
    world.leave()
