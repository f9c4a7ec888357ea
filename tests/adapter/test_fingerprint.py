"""An encoder's identity: the same weights are the same encoder, wherever their files lie and however they are cut."""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

from gpc_dist.adapter.fingerprint import (
    fingerprint_files,
    fingerprint_tensors,
    identify,
    shards,
    weight_files,
)
from gpc_dist.errors import UserError

from .encoders import saved_encoder, tiny


def test_shards_and_dtype_make_no_other_encoder(tmp_path: Path) -> None:
    whole = identify(saved_encoder(tmp_path / "whole"))
    shards = saved_encoder(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert identify(shards).sha256 == whole.sha256
    half = AutoModel.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    assert identify(half).sha256 == whole.sha256


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/tmp/model.safetensors", "..", "-x", ""])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_names_files_beside_it(tmp_path: Path, index: str, name: str) -> None:
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=rf"{index}: the file '{name}' (begins|is)"):
        shards(tmp_path / index)


@pytest.mark.parametrize("change", ["values", "name", "shape"])
def test_a_fingerprint_sees_values_names_and_shapes(tmp_path: Path, change: str) -> None:
    tensor = torch.arange(6.0)
    other = {
        "values": {"w": tensor + 1},
        "name": {"v": tensor},
        "shape": {"w": tensor.view(2, 3)},
    }[change]
    save_file({"w": tensor}, tmp_path / "a.safetensors")
    save_file(other, tmp_path / "b.safetensors")
    prints = [fingerprint_files([tmp_path / f"{name}.safetensors"]) for name in ("a", "a", "b")]
    assert prints[0] == prints[1]
    assert prints[0] != prints[2]


def test_a_fingerprint_is_that_of_adapters_saved_long_ago(tmp_path: Path) -> None:
    """SHA-256 over the tensors by name: name, type, shape, and the first 4 KiB of the values."""
    large, small = torch.arange(2000.0), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    save_file({"small": small, "large": large}, tmp_path / "one.safetensors", metadata={"format": "pt"})
    content = (
        b"large F32 [2000]" + large.numpy().tobytes()[:4096] + b"small F32 [2, 3]" + small.numpy().tobytes()
    )
    expected = hashlib.sha256(content).hexdigest()
    assert fingerprint_files([tmp_path / "one.safetensors"]) == expected
    beyond = large.clone()
    beyond[1023] += 1
    save_file({"large": beyond}, tmp_path / "a.safetensors")
    save_file({"small": small}, tmp_path / "b.safetensors")
    shards = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert fingerprint_files(shards) == fingerprint_files(shards[::-1]) != expected
    beyond[1023:1025] += torch.tensor([-1.0, 1.0])
    save_file({"large": beyond}, tmp_path / "a.safetensors")
    assert fingerprint_files(shards) == expected

    layer = torch.nn.Linear(3, 2)
    layer.weight.data.copy_(small)
    layer.register_parameter("large", torch.nn.Parameter(large.bfloat16()))
    parts = [("bias", layer.bias), ("large", large.bfloat16()[:1024].float()), ("weight", small)]
    shapes = {"bias": b"[2]", "large": b"[2000]", "weight": b"[2, 3]"}
    content = b"".join(n.encode() + b" " + shapes[n] + t.detach().numpy().tobytes() for n, t in parts)
    assert fingerprint_tensors(layer) == hashlib.sha256(content).hexdigest()


def test_an_encoder_of_the_hub_is_known_by_its_files_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--someone--small"
    commit = "c0ffee" + 34 * "0"
    tiny("bert").save_pretrained(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    encoder = AutoModel.from_pretrained("someone/small", cache_dir=tmp_path)
    unknown = identify(encoder)  # the cache that is looked into is another one
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = identify(encoder)
    for identity in (unknown, found):
        assert identity.path == "someone/small"
        assert (identity.model_type, identity.hidden_size, identity.layers) == ("bert", 32, 3)
    assert found.sha256 == fingerprint_files([cached / "snapshots" / commit / "model.safetensors"])
    assert unknown.sha256 == identify(tiny("bert")).sha256
    assert (found.revision, unknown.revision) == (commit, None)


def test_given_files_come_before_those_the_encoder_names(tmp_path: Path) -> None:
    encoder = saved_encoder(tmp_path / "one")
    saved_encoder(tmp_path / "two", seed=1)
    two = identify(AutoModel.from_pretrained(tmp_path / "two"))
    assert (
        identify(encoder, weight_files(str(tmp_path / "two"), None)).sha256
        == two.sha256
        != identify(encoder).sha256
    )
    assert identify(encoder, weight_files(str(tmp_path / "two"), None)).path == str(tmp_path / "one")
    assert two.revision is None


def test_pickled_weights_are_told_apart_without_being_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return pytest.fail, ("the file was unpickled",)

    for name, value in (("a", 1.0), ("b", 2.0)):
        torch.save({"w": torch.full((4,), value), "trap": Trap()}, tmp_path / f"{name}.bin")
    assert fingerprint_files([tmp_path / "a.bin"]) != fingerprint_files([tmp_path / "b.bin"])


def test_a_folder_of_pickled_weights_is_known_by_its_files(tmp_path: Path) -> None:
    encoder = tiny("bert")
    torch.save(encoder.state_dict(), tmp_path / "pytorch_model.bin")
    files = weight_files(str(tmp_path), None)
    assert files == [tmp_path / "pytorch_model.bin"]
    assert identify(encoder, files).sha256 == fingerprint_files(files)
    saved = saved_encoder(tmp_path)  # safetensors files come first
    assert identify(saved).sha256 == fingerprint_files([tmp_path / "model.safetensors"])


def test_files_that_only_lie_beside_the_weights_make_no_other_encoder(tmp_path: Path) -> None:
    encoder = saved_encoder(tmp_path / "whole")
    shards = saved_encoder(tmp_path / "shards", max_shard_size="20KB")
    known = identify(encoder).sha256
    for folder in ("whole", "shards"):
        for stray in ("model_old", "model.fp16", "model-00009-of-00009"):
            save_file({"w": torch.zeros(2)}, tmp_path / folder / f"{stray}.safetensors")
        (tmp_path / folder / "pytorch_model.bin").write_bytes(b"")
    assert identify(encoder).sha256 == identify(shards).sha256 == known


@pytest.mark.parametrize(
    "content",
    [b"null", b"[]", b"{}", b"[" * 100_000, b"\xff", b'{"weight_map": {}}', b'{"weight_map": {"a": 3}}']
    + [
        b'{"weight_map": {"a": ["x"]}}',
        b'{"weight_map": {"a": "x", "b": 3}}',
        b'{"weight_map": {}, "weight_map": {}}',
    ],
)
def test_an_index_of_other_things_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(UserError, match=r"index\.json") as caught:
        shards(tmp_path / "index.json")
    assert len(str(caught.value).splitlines()) == 1


def test_a_damaged_file_has_no_fingerprint(tmp_path: Path) -> None:
    save_file({"w": torch.arange(4.0)}, tmp_path / "a.safetensors")
    save_file({"w": torch.arange(4.0) + 1}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="both hold 'w'"):
        fingerprint_files([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"a\.safetensors is damaged"):
        fingerprint_files([tmp_path / "a.safetensors"])
    torch.save({"w": torch.arange(4.0)}, tmp_path / "c.bin")
    content = (tmp_path / "c.bin").read_bytes()
    directory = content.rfind(b"PK\x01\x02")
    (tmp_path / "c.bin").write_bytes(content[:directory] + b"PK\x01\x03" + content[directory + 4 :])
    with pytest.raises(UserError, match=r"c\.bin is damaged .*: fetch it again"):
        fingerprint_files([tmp_path / "c.bin"])
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(tmp_path / "d.bin", "w") as archive:
        archive.writestr("data", b"one")
        archive.writestr("data", b"two")
    with pytest.raises(UserError, match="has a name twice"):
        fingerprint_files([tmp_path / "d.bin"])


def test_a_zip_of_a_version_that_python_cannot_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", b"weights")
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 99  # the version that is needed to read it
    file.write_bytes(content)
    with pytest.raises(
        UserError, match=r"pytorch_model.bin is damaged \(zip file version 9.9\): fetch it again"
    ):
        fingerprint_files([file])


def test_pickled_weights_of_old_versions_are_told_apart(tmp_path: Path) -> None:
    encoder = tiny("bert")
    for value in (1.0, 2.0):
        state = {"w": torch.full((4,), value)}
        torch.save(state, tmp_path / f"{value}.bin", _use_new_zipfile_serialization=False)
    first, second = (fingerprint_files([tmp_path / f"{value}.bin"]) for value in (1.0, 2.0))
    assert first != second
    (tmp_path / "1.0.bin").rename(tmp_path / "pytorch_model.bin")
    assert identify(encoder, weight_files(str(tmp_path), None)).sha256 != identify(encoder).sha256


def test_random_weights_are_known_by_their_values_whatever_folders_lie_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_encoder(tmp_path)
    saved_encoder(tmp_path / "bert")
    monkeypatch.chdir(tmp_path)  # it holds weights, and so does a folder in it named as the family
    first, again, other = (identify(tiny("bert", seed)) for seed in (0, 0, 1))
    assert first == again
    assert first.sha256 != other.sha256
    assert first.path == "bert"
