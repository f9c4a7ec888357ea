"""What DeepSpeed has for frozen weights: second shards in groups of ranks (hpZ), and shards that are int8."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from gpc_dist import config
from gpc_dist.distributed import deepspeed_config
from gpc_dist.distributed.world import joined
from gpc_dist.encoder import frozen
from gpc_dist.encoder.quantize import SHARD_GROUP, ShardQuantizer, shard_matrices
from gpc_dist.errors import EXIT_USAGE, UserError
from tests.processes import on_ranks, start_on_ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_shards_are_near_their_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shard = torch.randn(4 * SHARD_GROUP, dtype=dtype)
    shard[:SHARD_GROUP] = 0
    shard[SHARD_GROUP : 2 * SHARD_GROUP] *= 1000
    values, scales = ShardQuantizer().quantize(shard)
    assert (values.dtype, values.shape, scales.dtype, scales.shape) == (
        torch.int8,
        (4 * SHARD_GROUP,),
        dtype,
        (4,),
    )
    found = ShardQuantizer().dequantize(values.view(8, -1), scales)
    assert (found.dtype, found.shape) == (dtype, (8, SHARD_GROUP // 2))
    # at most half a step of its own group's scale; rounding to the dtype beside it
    step = (shard.view(4, SHARD_GROUP).abs().amax(dim=1) / 127).repeat_interleave(SHARD_GROUP)
    rounding = shard.abs() * torch.finfo(dtype).eps
    assert ((found.view(-1) - shard).abs() <= 0.51 * step + rounding).all()


def test_the_matrices_that_ranks_cut_into_whole_groups() -> None:
    layers = [nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48), nn.Embedding(256, 2)), nn.Linear(64, 32)]
    assert {tuple(m.shape) for m in shard_matrices(layers, 2)} == {(48, 32), (32, 64)}
    with pytest.raises(
        UserError, match="and 3 ranks do not cut this encoder's matrices so: give 1, 2 ranks, or"
    ):
        shard_matrices(layers, 3)
    with pytest.raises(UserError, match="matrices so: give engine.quantize none"):
        shard_matrices([nn.Linear(3, 5)], 1)


ROWS = ["the cat sleeps in the old garden", "never", "a bird and a dog"]


def states(encoder: Path, folder: Path, name: str, settings: dict[str, str]) -> None:
    """On a rank, with two ranks on a machine: load an encoder and run it. Rank 0 writes what it computes, and how many
    values its shards have of each dtype."""
    built = config.build({}, {"encoder.path": str(encoder), **settings})
    with joined(built.engine) as world:
        loaded = frozen.load_encoder(built.encoder, torch.float32, world)
        values = deepspeed_config.resolve(built, world.size, torch.float32)
        hosts = [str(rank // 2) for rank in range(world.size)]
        frozen.place(loaded, world, built.engine, deepspeed_config.with_groups(values, hosts))
        encoder_, table = loaded.parts.encoder, loaded.parts.token_embeddings
        tokens = frozen.load_tokenizer(built.encoder)(ROWS, return_tensors="pt", padding=True).to(
            world.device
        )
        found = []
        for _ in range(2):  # from the second pass on, DeepSpeed gathers by a trace of the first
            given = table(tokens["input_ids"]).detach().requires_grad_(True)
            out = encoder_(inputs_embeds=given, attention_mask=tokens["attention_mask"]).last_hidden_state
            out.square().sum().backward()
            assert given.grad is not None
            found += [out.detach().cpu(), given.grad.cpu()]
        kept = Counter[str]()
        for parameter in encoder_.parameters():
            for shard in (getattr(parameter, each, None) for each in ("ds_tensor", "ds_secondary_tensor")):
                if shard is not None:
                    kept[str(shard.dtype)] += shard.numel()
        if world.is_main:
            torch.save(found, folder / f"{name}.pt")
            (folder / f"{name}.json").write_text(json.dumps(kept))


def run(
    encoder: Path, folder: Path, ranks: int, **engine: object
) -> tuple[list[torch.Tensor], dict[str, int]]:
    """What `states` writes on ranks with these keys of `engine`, each of them once for all tests."""
    engine = {"device": "cpu"} | engine
    name = "-".join([str(ranks), *(f"{key}={value}" for key, value in engine.items())])
    if not (folder / f"{name}.json").exists():
        settings = {f"engine.{key}": str(value) for key, value in engine.items()}
        for rank in start_on_ranks(ranks, states, encoder, folder, name, settings):
            assert rank.wait() == 0, rank.stderr
    return torch.load(folder / f"{name}.pt"), json.loads((folder / f"{name}.json").read_text())


def far(found: list[torch.Tensor], whole: list[torch.Tensor]) -> float:
    """Length of the difference, relative."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, whole, strict=True))


def same(found: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(found, other, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def whole(tiny_encoder: Path, folder: Path) -> list[torch.Tensor]:
    return run(tiny_encoder, folder, 1)[0]


MATRICES = 4 * (4 * 32 * 32 + 2 * 32 * 64)


@pytest.mark.slow
def test_second_shards_change_no_bit(tiny_encoder: Path, folder: Path, whole: list[torch.Tensor]) -> None:
    plain, once = run(tiny_encoder, folder, 4, zero_stage=3)
    found, kept = run(tiny_encoder, folder, 4, zero_stage=3, hpz="true")
    assert same(found, plain)
    assert far(found, whole) < 1e-5
    # the shard among four, and the one among two
    assert kept["torch.float32"] == pytest.approx(3 * once["torch.float32"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "engine", "share"),
    [(2, {}, 1 / 2), (1, {}, 1), (2, {"offload_param": "cpu"}, 1 / 2), (4, {"hpz": "true"}, 1 / 4 + 1 / 2)],
)
def test_int8_shards_are_gathered_as_int8(
    tiny_encoder: Path,
    folder: Path,
    whole: list[torch.Tensor],
    ranks: int,
    engine: dict[str, str],
    share: float,
) -> None:
    """On any ranks the same bits, because what shares a scale is cut by none."""
    found, kept = run(tiny_encoder, folder, ranks, zero_stage=3, quantize="int8", **engine)
    assert kept["torch.int8"] == MATRICES * share
    assert 1e-4 < far(found, whole) < 0.05
    assert same(found, run(tiny_encoder, folder, 2, zero_stage=3, quantize="int8")[0])


@pytest.mark.slow
def test_ranks_that_cut_what_shares_a_scale_are_refused(
    tiny_recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("--run.dir", tmp_path / "run", "--engine.zero_stage", 3, "--engine.quantize", "int8")
    done = on_ranks(3, "train", tiny_recipe, *words)
    assert done.returncode == EXIT_USAGE
    assert "and 3 ranks do not cut this encoder's matrices so: give 1, 2, 4 ranks, or" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.gpu
def test_int8_shards_on_a_gpu(tiny_encoder: Path, folder: Path, whole: list[torch.Tensor]) -> None:
    """With the quantiser that CPU ranks use: DeepSpeed's, which is compiled, is not asked for."""
    for engine in ({}, {"offload_param": "cpu"}):
        found, kept = run(tiny_encoder, folder, 1, device="cuda", zero_stage=3, quantize="int8", **engine)
        assert kept["torch.int8"] == MATRICES
        assert far(found, whole) < 0.05
