"""Runs whose prompt enters a later layer: from cached text states, from computed ones, on any ranks."""

from __future__ import annotations

import gc
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpc_dist import config as configuration
from gpc_dist.config import AdapterConfig
from gpc_dist.distributed.world import alone
from gpc_dist.encoder.state_cache import INDEX, STATES, CachedStates
from gpc_dist.inference.adapters import Predictor
from gpc_dist.tasks import make_task
from gpc_dist.training import text_states
from gpc_dist.training.session import Session, load_base, open_session
from gpc_dist.training.text_states import TextStates
from tests.conftest import gpc, losses
from tests.processes import call_on_ranks, on_ranks
from tests.training.packed import run_pack

pytestmark = pytest.mark.slow

FIRST = ("--adapter.first_layer", "2")  # of 4
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPC_DIST_CACHE", str(tmp_path / "states"))
    return tmp_path / "states"


def train(recipe: Path, folder: Path, *more: object) -> dict[str, Any]:
    assert gpc("train", recipe, "--run.dir", folder, *FIRST, *more) == 0
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def caches(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir())


def session(recipe: Path, *pairs: str) -> Session:
    settings = {"adapter.first_layer": "2"} | dict(zip(pairs[::2], pairs[1::2], strict=True))
    config = configuration.load(str(recipe), settings)
    world = alone(config.engine)
    return open_session(config, world, make_task(config.task, config.data), load_base(config, world))


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    """A run that computes its text states in every pass."""
    folder = tmp_path_factory.mktemp("runs") / "computed"
    result = train(tiny_recipe, folder, "--engine.state_cache", "none")
    assert (result["first_layer"], result["state_cache_mib"], result["state_cache_s"]) == (2, 0, 0)
    return folder


def test_cached_states_are_those_that_are_computed(
    tiny_recipe: Path, tmp_path: Path, computed: Path, root: Path
) -> None:
    filled = train(tiny_recipe, tmp_path / "filled")
    assert losses(tmp_path / "filled") == pytest.approx(losses(computed), rel=1e-5)
    assert len(caches(root)) == 3  # two splits, and the prompt's start
    bytes_ = sum((folder / STATES).stat().st_size for folder in caches(root))
    assert filled["state_cache_mib"] == pytest.approx(bytes_ / 2**20, rel=0.05)
    assert filled["state_cache_s"] > 0
    assert filled["samples_per_s_with_state_cache"] < filled["samples_per_s"]

    def never(_: TextStates) -> None:
        raise AssertionError("the layers below are not needed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextStates, "_encoder", never)
        again = train(tiny_recipe, tmp_path / "again")
    assert losses(tmp_path / "again") == losses(tmp_path / "filled")
    assert again["state_cache_s"] == 0
    assert again["state_cache_mib"] == filled["state_cache_mib"]


def test_what_lies_below_is_not_read(tiny_recipe: Path) -> None:
    def of(opened: Session) -> list[bool]:
        parts = opened.base.parts
        return [parts.token_embeddings.weight.is_meta, *(next(p.parameters()).is_meta for p in parts.layers)]

    assert of(session(tiny_recipe)) == [True, True, True, False, False]
    assert of(session(tiny_recipe, "adapter.first_layer", "0")) == [False] * 5
    assert of(session(tiny_recipe, "adapter.method", "linear-probe")) == [True] * 5


def test_once_they_are_released_they_are_in_no_memory(tiny_recipe: Path) -> None:
    def views() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count("model.safetensors")

    before = views()
    opened = session(tiny_recipe)
    opened.split(opened.task.read("validation"))
    assert views() == before + 2  # the layers from k on, and those below
    opened.release_lower_layers()
    assert views() == before + 1


@pytest.mark.parametrize(
    ("ranks", "stage", "cache"),
    [(2, 0, "disk"), (2, 3, "disk"), (2, 2, "memory"), (2, 3, "none"), (1, 3, "auto")],
)
def test_any_ranks_find_the_same_losses(
    tiny_recipe: Path, tmp_path: Path, computed: Path, root: Path, ranks: int, stage: int, cache: str
) -> None:
    done = on_ranks(
        ranks, "train", tiny_recipe, "--run.dir", tmp_path / "run", *FIRST,
        "--engine.zero_stage", stage, "--engine.state_cache", cache,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(computed), rel=2e-4)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["state_cache_mib"] > 0) == (cache != "none")
    assert root.exists() == (cache in ("disk", "auto"))
    assert not list(Path("/dev/shm").glob("gpc-dist-*/*/states.bin"))


def test_a_run_that_reads_little_computes_what_it_reads(
    tiny_recipe: Path, tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = ("--train.steps", "2", "--train.batch_size", "2")
    result = train(tiny_recipe, tmp_path / "few", *few)
    assert "each pass computes its text states: this run reads" in caplog.text
    kept = {json.loads((folder / INDEX).read_text())["rows"] for folder in caches(root)}
    train(tiny_recipe, tmp_path / "all", *few, "--engine.state_cache", "disk")
    rows = {json.loads((folder / INDEX).read_text())["rows"] for folder in caches(root)}
    assert max(kept) < max(rows)  # those of the validation split, and of the training split too
    assert losses(tmp_path / "few") == pytest.approx(losses(tmp_path / "all"), rel=1e-5)
    again = train(tiny_recipe, tmp_path / "again", *few)  # what is there is read
    assert losses(tmp_path / "again") == losses(tmp_path / "all")
    assert again["state_cache_mib"] > result["state_cache_mib"]


def test_states_do_not_depend_on_the_number_of_ranks(tiny_recipe: Path, tmp_path: Path, root: Path) -> None:
    found = {}
    for ranks in (1, 2):
        done = on_ranks(ranks, "train", tiny_recipe, "--run.dir", tmp_path / f"{ranks}", *FIRST)
        assert done.returncode == 0, done.stderr
        found[ranks] = {folder.name: (folder / STATES).read_bytes() for folder in caches(root)}
        shutil.rmtree(root)
    assert found[1] == found[2]


@pytest.mark.parametrize(
    "engine",
    [("quantize", "int8"), ("activation_checkpointing", "true"), ("dtype", "bf16"), ("token_table", "host")],
)
def test_cached_states_serve_every_engine(
    tiny_recipe: Path, tmp_path: Path, computed: Path, engine: tuple[str, str]
) -> None:
    more = (f"--engine.{engine[0]}", engine[1])
    train(tiny_recipe, tmp_path / "none", *more, "--engine.state_cache", "none")
    train(tiny_recipe, tmp_path / "run", *more)
    # rows have other neighbours in the passes that fill a cache
    assert losses(tmp_path / "run") == pytest.approx(
        losses(tmp_path / "none"), rel=1e-2 if "bf16" in engine else 1e-5
    )
    changes = engine[0] in ("quantize", "dtype")
    assert (losses(tmp_path / "run") != pytest.approx(losses(computed), rel=1e-5)) == changes


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_a_linear_probe_runs_the_encoder_once(tiny_recipe: Path, tmp_path: Path, cache: str) -> None:
    """Cached pooled states give what a pass through the whole encoder gives."""
    more = ("--adapter.method", "linear-probe", "--adapter.pooling", "first")
    plain = train(tiny_recipe, tmp_path / "none", *more, "--engine.state_cache", "none")
    probe = train(tiny_recipe, tmp_path / "run", *more, "--engine.state_cache", cache)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "none"), rel=1e-5)
    for name in ("tokens_per_s", "padding_pct"):
        assert (probe[name] > 0) == (plain[name] > 0)
    assert probe["padding_pct"] == plain["padding_pct"]  # that of the text, not of what is cached


def test_a_probe_that_mixes_layers_reads_those_from_its_first_one(
    tiny_recipe: Path, tmp_path: Path, root: Path
) -> None:
    more = ("--adapter.method", "linear-probe", "--adapter.head_layers", "mix")
    result = train(tiny_recipe, tmp_path / "run", *more)
    assert result["first_layer"] == 4
    assert result["trainable_parameters"] == 32 * 2 + 2 + 3  # and one weight for each of the states mixed
    assert {len((folder / STATES).read_bytes()) % (3 * 32 * 4) for folder in caches(root)} == {0}
    train(tiny_recipe, tmp_path / "none", *more, "--engine.state_cache", "none")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "none"), rel=1e-5)


def test_a_resumed_run_is_the_undisturbed_one(tiny_recipe: Path, tmp_path: Path) -> None:
    train(tiny_recipe, tmp_path / "whole", "--train.save_every", "5", "--train.keep_last", "9")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for late in sorted((tmp_path / "cut" / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(late)
    train(tiny_recipe, tmp_path / "cut", "--train.save_every", "5", "--train.keep_last", "9")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_an_adapter_evaluates_and_predicts_as_it_was_trained(
    tiny_recipe: Path, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(tiny_recipe, tmp_path / "run")
    before = caches(root)
    capsys.readouterr()
    assert gpc("evaluate", tmp_path / "run" / "adapter") == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["metrics"] == pytest.approx(result["metrics"]["best"], rel=1e-5)
    predictor = Predictor(tmp_path / "run" / "adapter")
    rows = [{name: "a film that is good" for name in predictor.session.task.columns} for _ in range(2)]
    assert len(predictor.predict(rows)) == 2
    assert caches(root) == before  # what is predicted once is not kept
    assert gpc("inspect", tmp_path / "run" / "adapter", "--json", tmp_path / "layers.json") == 0
    ((_, layers),) = json.loads((tmp_path / "layers.json").read_text())["adapters"].items()
    assert [layer["layer"] for layer in layers] == [2, 3]
    assert layers[0]["cosine"] == pytest.approx(1)
    assert layers[0]["written"] is None
    assert layers[1]["written"] > 0


def test_a_damaged_cache_ends_a_run_in_one_line(
    tiny_recipe: Path, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_recipe, tmp_path / "run")
    largest = max((folder / STATES for folder in caches(root)), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[::50] = bytes(len(content[::50]))
    largest.write_bytes(content)
    capsys.readouterr()
    assert gpc("train", tiny_recipe, "--run.dir", tmp_path / "other", *FIRST) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"gpc-dist cache --remove {largest.parent.name}" in said
    assert not (tmp_path / "other" / "result.json").exists()


def test_filling_that_was_interrupted_starts_again(
    tiny_recipe: Path, tmp_path: Path, root: Path, computed: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_states.StatesWriter, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session(tiny_recipe).text_states.entering(torch.tensor([7, 8]))
    assert caches(root) == []
    train(tiny_recipe, tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(losses(computed), rel=1e-5)


@pytest.mark.parametrize("cache", ["auto", "disk", "memory"])
def test_a_cache_that_has_no_room(
    tiny_recipe: Path,
    tmp_path: Path,
    computed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cache: str,
) -> None:
    monkeypatch.setattr(text_states.shutil, "disk_usage", lambda _: Usage(100, 90, 10))
    more = ("--run.dir", tmp_path / "run", *FIRST, "--engine.state_cache", cache)
    code = gpc("train", tiny_recipe, *more)
    said = capsys.readouterr().err
    if cache == "auto":
        assert code == 0
        assert "no room in memory" in said
        assert "every pass computes its own" in said
        assert losses(tmp_path / "run") == losses(computed)
    else:
        assert code == 2
        assert f"no room {'on' if cache == 'disk' else 'in'} {cache}" in said
        assert "engine.state_cache none" in said


def test_packed_runs_are_the_runs_alone(tiny_recipe: Path, tmp_path: Path) -> None:
    settings = {"adapter.first_layer": "2", "train.steps": "8"}
    runs = {
        name: [str(tiny_recipe), settings | {"run.dir": str(tmp_path / name), "run.seed": str(seed)}]
        for seed, name in enumerate(("a", "b"))
    }
    plan = {"runs": runs, "first": ["a"], "then": [{"after": "a", "step": 4, "join": ["b"]}]}
    plan["runs"]["a"][1] |= {"train.eval_every": "4"}
    call_on_ranks(2, run_pack, plan)
    for seed, name in enumerate(("a", "b")):
        own = {"--run.seed": seed, "--train.steps": 8} | ({"--train.eval_every": 4} if name == "a" else {})
        train(tiny_recipe, tmp_path / f"{name}-alone", *(word for pair in own.items() for word in pair))
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / f"{name}-alone"), rel=2e-4)


def test_only_adapters_of_one_entry_share_an_encoder() -> None:
    entries = [
        AdapterConfig().entry,
        AdapterConfig(first_layer=2).entry,
        AdapterConfig(first_layer=0.5).entry,
        AdapterConfig(method="linear-probe").entry,
        AdapterConfig(method="linear-probe", pooling="first").entry,
        AdapterConfig(method="linear-probe", head_layers="mix").entry,
        AdapterConfig(method="linear-probe", head_layers="mix", first_layer=2).entry,
        AdapterConfig(method="fine-tuning").entry,
    ]
    assert len(set(entries)) == len(entries)
    assert AdapterConfig(method="prompt-tuning", first_layer=2, pooling="first").entry == entries[1]


def test_rows_that_come_first_are_read_first(tiny_recipe: Path) -> None:
    opened = session(tiny_recipe)
    split = opened.split(opened.task.read("validation"))
    assert isinstance(split.states, CachedStates)
    width = int(split.encoded.lengths.max())
    states = split.states.padded(np.arange(len(split.encoded.lengths)), width)
    assert states.shape == (len(split.encoded.lengths), width, 32)
    assert bool(states[0, : split.encoded.lengths[0]].any(dim=1).all())
