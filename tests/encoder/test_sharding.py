"""What DeepSpeed has for frozen weights: second shards in groups of ranks (hpZ), and shards that are int8."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gpc_dist import config
from gpc_dist.adapter.families import EncoderParts
from gpc_dist.config import EngineConfig
from gpc_dist.distributed import deepspeed_config
from gpc_dist.distributed.world import World, alone, joined
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
    layers = [
        nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48), nn.Embedding(256, 2)),
        nn.ModuleList([nn.Linear(64, 32)]),
    ]
    assert {tuple(m.shape) for m in shard_matrices(layers, 2)} == {(48, 32), (32, 64)}
    with pytest.raises(
        UserError, match="and 3 ranks do not cut this encoder's matrices so: give 1, 2 ranks, or"
    ):
        shard_matrices(layers, 3)
    with pytest.raises(UserError, match="matrices so: give engine.quantize none"):
        shard_matrices([nn.Sequential(nn.Linear(3, 5))], 1)


ROWS = ["the cat sleeps in the old garden", "never", "a bird and a dog"]


def passes(parts: EncoderParts, tokenizer: Any, device: torch.device) -> list[torch.Tensor]:
    """The last states, and the gradients of what enters, of two passes: from the second one on, DeepSpeed gathers by a
    trace of the first."""
    tokens = tokenizer(ROWS, return_tensors="pt", padding=True).to(device)
    found = []
    for _ in range(2):
        given = parts.token_embeddings(tokens["input_ids"]).detach().requires_grad_(True)
        encoder: Any = parts.encoder
        out = encoder(inputs_embeds=given, attention_mask=tokens["attention_mask"]).last_hidden_state
        out.tanh().sum().backward()
        assert given.grad is not None
        found += [out.detach().cpu(), given.grad.cpu()]
    return found


def load(path: Path, world: World, **engine: object) -> tuple[EncoderParts, Any]:
    """An encoder, placed, and its tokenizer. Two ranks are taken for a machine."""
    keys = {f"engine.{key}": str(value) for key, value in engine.items()}
    built = config.build({}, {"encoder.path": str(path), **keys})
    loaded = frozen.load_encoder(built.encoder, torch.float32, world)
    values = deepspeed_config.resolve(built, world.size, torch.float32)
    hosts = [str(rank // 2) for rank in range(world.size)]
    frozen.place(loaded, world, built.engine, deepspeed_config.with_groups(values, hosts))
    return loaded.parts, frozen.load_tokenizer(built.encoder)


def states(path: Path, folder: Path, name: str, engine: dict[str, str]) -> None:
    """On a rank: what an encoder computes, and how many values its shards have of each dtype; rank 0 writes it."""
    with joined(EngineConfig(zero_stage=3, device=engine["device"])) as world:
        parts, tokenizer = load(path, world, zero_stage=3, **engine)
        found = passes(parts, tokenizer, world.device)
        kept = Counter[str]()
        for parameter in parts.encoder.parameters():
            for shard in (getattr(parameter, each, None) for each in ("ds_tensor", "ds_secondary_tensor")):
                if shard is not None:
                    kept[str(shard.dtype)] += shard.numel()
        if world.is_main:
            torch.save(found, folder / f"{name}.pt")
            (folder / f"{name}.json").write_text(json.dumps(kept))


def run(path: Path, folder: Path, ranks: int, **engine: str) -> tuple[list[torch.Tensor], dict[str, int]]:
    """What `states` writes at stage 3 on ranks with these keys of `engine`, each of them once for all tests."""
    engine = {"device": "cpu"} | engine
    name = "-".join([str(ranks), *engine, *engine.values()])
    if not (folder / f"{name}.json").exists():
        for rank in start_on_ranks(ranks, states, path, folder, name, engine):
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
def whole(tiny_encoder: Path) -> list[torch.Tensor]:
    world = alone(EngineConfig(device="cpu"))
    return passes(*load(tiny_encoder, world, device="cpu"), world.device)


@pytest.fixture(scope="module")
def rounded(tiny_encoder: Path) -> list[torch.Tensor]:
    """Of matrices whose values are each one of 255 that 256 neighbours have."""
    world = alone(EngineConfig(device="cpu"))
    parts, tokenizer = load(tiny_encoder, world, device="cpu")
    for layer in parts.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                groups = module.weight.detach().reshape(-1, 256)
                step = groups.abs().max(dim=1, keepdim=True).values / 127
                module.weight = nn.Parameter(
                    (torch.round(groups / step) * step).view_as(module.weight), False
                )
    return passes(parts, tokenizer, world.device)


MATRICES = 4 * (4 * 32 * 32 + 2 * 32 * 64)


@pytest.mark.slow
def test_second_shards_change_no_bit(tiny_encoder: Path, folder: Path, whole: list[torch.Tensor]) -> None:
    plain, once = run(tiny_encoder, folder, 4)
    found, kept = run(tiny_encoder, folder, 4, hpz="true")
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
    rounded: list[torch.Tensor],
    ranks: int,
    engine: dict[str, str],
    share: float,
) -> None:
    """On any ranks the same bits, because what shares a scale is cut by none."""
    found, kept = run(tiny_encoder, folder, ranks, quantize="int8", **engine)
    assert kept["torch.int8"] == MATRICES * share
    assert far(found, rounded) < 1e-4
    assert 1e-3 < far(found, whole) < 0.1
    assert same(found, run(tiny_encoder, folder, 2, quantize="int8")[0])


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
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_int8_shards_on_a_gpu(
    tiny_encoder: Path, folder: Path, rounded: list[torch.Tensor], offload: str
) -> None:
    """With the quantiser that CPU ranks have: nothing is compiled."""
    found, kept = run(tiny_encoder, folder, 1, device="cuda", quantize="int8", offload_param=offload)
    assert kept["torch.int8"] == MATRICES
    assert far(found, rounded) < 0.01
