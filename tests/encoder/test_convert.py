"""Encoder-only copies of checkpoints: they hold what the checkpoint holds, whatever stops their making."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, T5Config, T5EncoderModel, T5ForConditionalGeneration

from gpc_dist import locks
from gpc_dist.config import EncoderConfig
from gpc_dist.encoder import convert as conversion
from gpc_dist.encoder.convert import convert
from gpc_dist.encoder.frozen import load_encoder
from gpc_dist.encoder.weights import check_sums
from gpc_dist.errors import EXIT_USAGE, MachineError, UserError
from tests.adapter.encoders import FAMILIES, tiny
from tests.conftest import gpc
from tests.encoder.test_weights import ALONE, load, turned, values

TOKENIZER = ("vocab.txt", "tokenizer.json", "tokenizer_config.json")


def t5(folder: Path, tokenizer: Path) -> T5ForConditionalGeneration:
    """A checkpoint as older ones are: encoder and decoder in one `.bin`, matrices stored column by column."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=80, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    config.save_pretrained(folder)
    torch.save(
        {name: turned(value) for name, value in model.state_dict().items()}, folder / "pytorch_model.bin"
    )
    for name in TOKENIZER:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder)
    return model


@pytest.fixture
def source(tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(conversion, "FILE_BYTES", 2048)
    t5(tmp_path / "source", tiny_encoder)
    return tmp_path / "source"


def weights_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_copy_holds_the_encoder_alone(source: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    config = EncoderConfig(path=str(source))
    written = convert(config, tmp_path / "copy", dtype)
    copied = weights_of(tmp_path / "copy")
    assert written == {file.name: file.stat().st_size for file in copied}
    assert len(copied) > 3
    tensors = {name: tensor for file in copied for name, tensor in load_file(file).items()}
    whole = T5ForConditionalGeneration.from_pretrained(source)
    wanted = T5EncoderModel(whole.config)
    wanted.load_state_dict(whole.state_dict(), strict=False)
    right = {name: parameter.to(dtype) for name, parameter in wanted.named_parameters()}
    assert tensors.keys() == right.keys()
    assert all(torch.equal(tensors[name], right[name]) for name in right)
    assert all(tensor.dtype == dtype for tensor in tensors.values())

    index = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "copy" / file)
    check_sums(copied)
    assert {file.stat().st_mode for file in copied} == {(source / "config.json").stat().st_mode}
    by_transformers = T5EncoderModel.from_pretrained(tmp_path / "copy", dtype=dtype)
    assert all(torch.equal(value, right[name]) for name, value in by_transformers.named_parameters())
    for text in ("the cat sleeps", "a dog, and a bird"):
        ids = [
            AutoTokenizer.from_pretrained(folder)(text).input_ids for folder in (source, tmp_path / "copy")
        ]
        assert ids[0] == ids[1]


def test_encoder_path_takes_a_copy(source: Path, tmp_path: Path) -> None:
    convert(EncoderConfig(path=str(source)), tmp_path / "copy", torch.bfloat16)
    found = values(load(tmp_path / "copy", torch.bfloat16, checksum=True))
    right = values(load(source, torch.bfloat16))
    assert found.keys() == right.keys()
    assert all(torch.equal(found[name], right[name]) for name in right)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_copied(
    family: str, tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "load_tokenizer", lambda _: AutoTokenizer.from_pretrained(tiny_encoder))
    tiny(family).save_pretrained(tmp_path / "source")
    convert(EncoderConfig(path=str(tmp_path / "source")), tmp_path / "copy", torch.float32)
    found, right = values(load(tmp_path / "copy")), values(load(tmp_path / "source"))
    assert found.keys() == right.keys()
    assert all(torch.equal(found[name], right[name]) for name in right)


def stopped_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the conversion be killed while it writes a file, of which a half is there."""
    save, written = conversion.save_file, []

    def save_file(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        save(tensors, path, **options)
        written.append(path)
        if len(written) > count:
            path.write_bytes(path.read_bytes()[:-8])
            path.with_name(".tmpX1y2Z3").write_bytes(b"what the library writes first")
            raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "save_file", save_file)


@pytest.mark.parametrize("count", [0, 2])
def test_a_conversion_that_was_killed_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    config, copy = EncoderConfig(path=str(source)), tmp_path / "copy"
    with monkeypatch.context() as patch:
        stopped_after(count, patch)
        with pytest.raises(KeyboardInterrupt):
            convert(config, copy, torch.bfloat16)
    before = {file: file.stat().st_ino for file in weights_of(copy)}
    assert len(before) == count
    with pytest.raises(UserError, match="it holds no model.safetensors"):
        load_encoder(EncoderConfig(path=str(copy)), torch.bfloat16, ALONE)
    written = convert(config, copy, torch.bfloat16)
    assert {file: file.stat().st_ino for file in before} == before
    assert len(weights_of(copy)) == len(written) > count
    assert not (copy / ".unfinished").exists()
    found, right = values(load(copy, torch.bfloat16)), values(load(source, torch.bfloat16))
    assert all(torch.equal(found[name], right[name]) for name in right)


def test_a_file_that_is_not_the_checkpoints_is_written_anew(source: Path, tmp_path: Path) -> None:
    config, copy = EncoderConfig(path=str(source)), tmp_path / "copy"
    convert(config, copy, torch.bfloat16)
    whole = {file: file.read_bytes() for file in weights_of(copy)}
    first, second, third, *_ = whole
    changed = bytearray(whole[first])
    changed[-1] ^= 1
    first.write_bytes(changed)
    second.write_bytes(whole[second][:-2])
    third.unlink()
    convert(config, copy, torch.bfloat16)
    assert {file: file.read_bytes() for file in weights_of(copy)} == whole


def test_what_the_drive_lost_is_no_copy(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = conversion.save_file

    def lose(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        save({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, path, **options)

    monkeypatch.setattr(conversion, "save_file", lose)
    with pytest.raises(MachineError, match=r"model-00001-of-\d+.safetensors does not hold what was written"):
        convert(EncoderConfig(path=str(source)), tmp_path / "copy", torch.bfloat16)
    assert not (tmp_path / "copy" / "model.safetensors.index.json").exists()


def a_file(folder: Path) -> None:
    folder.write_text("mine")


def a_folder_with_notes(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")


def a_model(folder: Path) -> None:
    """Of the names that a copy has, too."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (a_file, "copy is a file"),
        (a_folder_with_notes, "copy holds notes.txt, which gpc-dist did not write"),
        (a_model, "copy holds config.json, which gpc-dist did not write"),
    ],
)
def test_what_is_the_users_is_left_alone(
    source: Path, tmp_path: Path, there: Callable[[Path], None], message: str
) -> None:
    copy = tmp_path / "copy"
    there(copy)
    before = [(path, path.is_file() and path.read_text()) for path in sorted(tmp_path.glob("copy*/**"))]
    with pytest.raises(UserError, match=message):
        convert(EncoderConfig(path=str(source)), copy, torch.bfloat16)
    assert [
        (path, path.is_file() and path.read_text()) for path in sorted(tmp_path.glob("copy*/**"))
    ] == before
    with pytest.raises(UserError, match="did not write"):
        convert(EncoderConfig(path=str(source)), source, torch.bfloat16)


def test_a_copy_of_something_else_is_refused(source: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    config, copy = EncoderConfig(path=str(source)), tmp_path / "copy"
    convert(config, copy, torch.bfloat16)
    with pytest.raises(UserError, match=r"in bfloat16, not of .* in float32: give another folder"):
        convert(config, copy, torch.float32)
    with pytest.raises(UserError, match=f"holds a copy of {source} .* not of {tiny_encoder}"):
        convert(EncoderConfig(path=str(tiny_encoder)), copy, torch.bfloat16)
    (copy / "mine.txt").write_text("")
    with pytest.raises(UserError, match="holds mine.txt"):
        convert(config, copy, torch.bfloat16)


def test_two_processes_do_not_write_one_copy(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    with locks.hold(copy / ".lock"), pytest.raises(UserError, match="being written by another process"):
        convert(EncoderConfig(path=str(source)), copy, torch.bfloat16)
    assert [path.name for path in copy.iterdir()] == [".lock"]


@pytest.mark.slow
def test_fetch_makes_a_copy_that_training_takes(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    assert gpc("fetch", tiny_recipe, "--dtype", "bf16") == EXIT_USAGE
    assert "give --convert DIR too" in capsys.readouterr().err
    for _ in range(2):
        assert gpc("fetch", tiny_recipe, "--convert", copy, "--dtype", "bf16") == 0
        assert "MiB of bf16 in 1 files" in capsys.readouterr().out
    arguments = ("--encoder.path", copy, "--encoder.checksum", "true", "--engine.dtype", "bf16")
    assert gpc("train", tiny_recipe, *arguments, "--run.dir", tmp_path / "run", "--train.steps", 2) == 0
