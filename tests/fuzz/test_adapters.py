"""Adapter folders and checkpoints: what is loaded is what the safetensors library reads and the card says, or they are
refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from gpc_dist.adapter import Adapter, AdapterConfig
from gpc_dist.adapter.fingerprint import EncoderIdentity
from gpc_dist.adapter.lane import EncoderShape
from gpc_dist.adapter.store import CARD, WEIGHTS, AdapterCard, load_adapter, read_card, save_adapter
from gpc_dist.config import Config, TrainConfig
from gpc_dist.distributed import checkpoint
from gpc_dist.distributed.optimizer import LaneOptimizer
from gpc_dist.distributed.world import World
from gpc_dist.errors import UserError
from gpc_dist.files import sha256
from gpc_dist.inference.adapters import adapter_config
from gpc_dist.training.state import Position, restore_state, save_state
from tests.fuzz.conftest import FUZZ, judged
from tests.fuzz.mutations import as_json, changed_bytes, changed_tree, trees

SHAPE = EncoderShape(layers=3, hidden_size=8, embedding_size=8)
ENCODER = EncoderIdentity("somewhere/bert", None, "bert", 8, 3, "0" * 64)
CONFIG = AdapterConfig(prompt_tokens=2, cell="residual")
TASK = {"task": {"name": "cats", "text": ["text"], "labels": ["no", "yes"]}, "data": {"path": "somewhere"}}
TYPES = [torch.int8, torch.int64, torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float64]
ALONE = World(0, 1, 0, torch.device("cpu"))


def drawn_adapter(seed: int) -> Adapter:
    adapter = Adapter(CONFIG, SHAPE, 2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return adapter


class Files(dict[str, bytes]):
    """Name -> content; with a short name for hypothesis to print."""

    def __repr__(self) -> str:
        return f"Files({', '.join(self)})"


def placed(files: dict[str, bytes], folder: Path) -> Path:
    """A folder with these files and no others."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def same(found: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return found.keys() == right.keys() and all(
        torch.equal(found[name], tensor.float()) for name, tensor in right.items()
    )


# -- adapters --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "adapter"


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Files:
    """Of a good one, which is loaded once, so that what this imports is not measured."""
    save_adapter(folder, drawn_adapter(0), ENCODER, TASK)
    load_adapter(folder)
    return Files({name: (folder / name).read_bytes() for name in (CARD, WEIGHTS)})


def check_adapter(folder: Path, files: dict[str, bytes]) -> None:
    placed(files, folder)
    found = judged(lambda: load_adapter(folder))
    event("refused" if isinstance(found, UserError) else "loaded")
    if isinstance(found, UserError):
        assert str(folder) in str(found)
        return
    loaded, card = found
    tensors = {name: p.detach() for name, p in loaded.named_parameters()}
    assert same(tensors, load(files[WEIGHTS]))
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values())
    check_card(card, json.loads(files[CARD]))


def check_card(card: AdapterCard, written: dict[str, Any]) -> None:
    """What was read from a card is what a second reader finds there."""
    assert card.adapter == AdapterConfig(**written["adapter"])
    assert card.shape == EncoderShape(**{key: int(written["shape"][key]) for key in asdict(SHAPE)})
    assert (card.outputs, card.task) == (int(written["outputs"]), written["task"])
    assert card.encoder.sha256 == written["encoder"]["sha256"]
    fits = judged(lambda: card.check_encoder(ENCODER, SHAPE))
    assert isinstance(fits, UserError) is ((card.shape, card.encoder.sha256) != (SHAPE, ENCODER.sha256))
    judged(lambda: adapter_config(card))


@FUZZ
@given(data=st.data())
def test_weights_that_changed_behind_the_card(folder: Path, adapter: Files, data: st.DataObject) -> None:
    """The card has their SHA-256: none is taken."""
    content = data.draw(changed_bytes(adapter[WEIGHTS]))
    placed(adapter | {WEIGHTS: content}, folder)
    found = judged(lambda: load_adapter(folder))
    assert isinstance(found, UserError) is (content != adapter[WEIGHTS])


@FUZZ
@given(data=st.data())
def test_weights_without_a_checksum(folder: Path, adapter: Files, data: st.DataObject) -> None:
    """As older versions wrote them: what is taken is what the library reads."""
    card = json.loads(adapter[CARD])
    del card["weights_sha256"]
    tensors, name = load(adapter[WEIGHTS]), data.draw(st.sampled_from(sorted(load(adapter[WEIGHTS]))))
    way = data.draw(st.sampled_from(["bytes", "value", "type", "shape", "drop", "name"]))
    if way == "value":
        value = data.draw(st.sampled_from([float("nan"), float("inf"), 1e38, 0.0]))
        tensors[name].view(-1)[data.draw(st.integers(0, tensors[name].numel() - 1))] = value
    elif way == "type":
        tensors[name] = tensors[name].to(data.draw(st.sampled_from([*TYPES, torch.complex64])))
    elif way == "shape":
        tensors[name] = torch.zeros(data.draw(st.lists(st.integers(0, 9), max_size=3)))
    elif way == "name":
        tensors[data.draw(st.text(max_size=4))] = tensors.pop(name)
    elif way == "drop":
        del tensors[name]
    content = data.draw(changed_bytes(adapter[WEIGHTS])) if way == "bytes" else save(tensors)
    check_adapter(folder, {CARD: as_json(card), WEIGHTS: content})


@FUZZ
@given(data=st.data())
def test_cards_of_other_things(folder: Path, adapter: Files, data: st.DataObject) -> None:
    card = data.draw(changed_tree(json.loads(adapter[CARD])))
    check_adapter(folder, adapter | {CARD: as_json(card)})


@FUZZ
@given(data=st.data())
def test_sizes_in_a_card(folder: Path, adapter: Files, data: st.DataObject) -> None:
    card = json.loads(adapter[CARD])
    size = st.sampled_from([-1, 0, 1, 2, 4, 8, 1000, 10**4, 10**6, 10**9, 2**31, 2**62, 2**63, 2**64, 10**30])
    places = [
        "shape.layers",
        "shape.hidden_size",
        "shape.embedding_size",
        "adapter.prompt_tokens",
        "adapter.cell_rank",
    ]
    for place in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=3)):
        section, key = place.split(".")
        card[section][key] = data.draw(size)
    card["outputs"] = data.draw(st.just(2) | size)
    card["adapter"]["cell_per_layer"] = data.draw(st.booleans())
    card["adapter"]["method"] = data.draw(
        st.sampled_from(["gpc", "deep-prompt", "linear-probe", "fine-tuning"])
    )
    check_adapter(folder, adapter | {CARD: as_json(card)})


@FUZZ
@given(data=st.data())
def test_bytes_of_a_card(folder: Path, adapter: Files, data: st.DataObject) -> None:
    content = data.draw(changed_bytes(adapter[CARD]) | st.binary(max_size=64))
    placed(adapter | {CARD: content}, folder)
    found = judged(lambda: read_card(folder))
    if not isinstance(found, UserError):
        check_card(found, json.loads(content))


# -- checkpoints -----------------------------------------------------------------------------------------------

RUN = Config.model_validate({"train": {"steps": 9}})
POSITION = Position(
    step=4, best={"accuracy": 0.5}, best_step=4, best_confusion=[[1, 2], [3, 4]], last={"accuracy": 0.5}
)
SEALED = ("trained.safetensors", "rng.safetensors", "state.json")


def optimizer_of(seed: int, kind: str = "adamw") -> LaneOptimizer:
    return LaneOptimizer(drawn_adapter(seed), TrainConfig(optimizer=kind), ALONE, 0)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["adamw", "adafactor"])
def kind(request: pytest.FixtureRequest) -> str:
    """Of an optimizer."""
    return request.param


@pytest.fixture(scope="module")
def saved(folder: Path, kind: str) -> Files:
    """Of a good checkpoint after one step, which is restored once."""
    optimizer = optimizer_of(0, kind)
    for parameter in optimizer.named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.apply(1.0)
    save_state(folder.parent / kind, RUN, ENCODER, optimizer, POSITION)
    path = checkpoint.newest(folder.parent / kind)
    assert path is not None
    restore_state(checkpoint.load(path), ENCODER, optimizer)
    return Files({name: (path / name).read_bytes() for name in (*SEALED, "COMPLETE")})


def check_checkpoint(folder: Path, kind: str, files: dict[str, bytes]) -> None:
    path = placed(files, folder.parent / "step-00000004")
    (path / "COMPLETE").write_text(json.dumps({name: sha256(path / name) for name in SEALED}))
    optimizer = optimizer_of(1, kind)

    def restore() -> tuple[checkpoint.Checkpoint, Position]:
        loaded = checkpoint.load(path)
        return loaded, restore_state(loaded, ENCODER, optimizer)

    with torch.random.fork_rng(devices=[]):
        found = judged(restore)
        generator = torch.get_rng_state()
    event("refused" if isinstance(found, UserError) else "restored")
    if isinstance(found, UserError):
        return
    tensors, rng = load(files["trained.safetensors"]), load(files["rng.safetensors"])
    state = json.loads(files["state.json"])
    assert same(optimizer.state(), tensors)
    # of a state that torch takes, it does not keep every byte
    assert len(rng) != 1 or torch.equal(generator, torch.Generator().set_state(rng["0"]).get_state())
    assert found[1].step == state["step"] == int(state["position"]["step"])
    assert state["encoder_sha256"] == ENCODER.sha256
    assert state["format"] == checkpoint.FORMAT


@FUZZ
@given(data=st.data())
def test_checkpoints_whose_files_changed(folder: Path, saved: Files, data: st.DataObject) -> None:
    """Without their checksums: none is taken."""
    name = data.draw(st.sampled_from(SEALED))
    content = data.draw(changed_bytes(saved[name]))
    path = placed(saved | {name: content}, folder.parent / "step-00000004")
    found = judged(lambda: checkpoint.load(path))
    assert isinstance(found, UserError) is (content != saved[name])


@FUZZ
@given(data=st.data())
def test_checkpoints_with_other_tensors(folder: Path, kind: str, saved: Files, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(SEALED[:2]))
    tensors = load(saved[file])
    name = data.draw(st.sampled_from(sorted(tensors)))
    way = data.draw(st.sampled_from(["bytes", "type", "shape", "drop", "name", "more"]))
    if way == "type":
        tensors[name] = tensors[name].to(data.draw(st.sampled_from(TYPES)))
    elif way == "shape":
        tensors[name] = torch.zeros(
            data.draw(st.lists(st.integers(0, 9), max_size=3)), dtype=tensors[name].dtype
        )
    elif way == "name":
        tensors[data.draw(st.text(max_size=4))] = tensors.pop(name)
    elif way == "more":
        tensors[data.draw(st.sampled_from(["1", "00", "param/x", "state/x/step"]))] = tensors[name].clone()
    elif way == "drop":
        del tensors[name]
    content = data.draw(changed_bytes(saved[file])) if way == "bytes" else save(tensors)
    check_checkpoint(folder, kind, saved | {file: content})


@FUZZ
@given(data=st.data())
def test_checkpoints_with_another_state(folder: Path, kind: str, saved: Files, data: st.DataObject) -> None:
    tree = json.loads(saved["state.json"])
    tree["identity"] = {"seed": 0}  # it is compared elsewhere
    content = data.draw(changed_tree(tree).map(as_json) | changed_bytes(saved["state.json"]))
    check_checkpoint(folder, kind, saved | {"state.json": content})


@FUZZ
@given(content=trees.map(as_json) | st.binary(max_size=64))
def test_markers_of_other_things(folder: Path, saved: Files, content: bytes) -> None:
    path = placed(saved | {"COMPLETE": content}, folder.parent / "step-00000004")
    assert isinstance(judged(lambda: checkpoint.load(path)), UserError)
